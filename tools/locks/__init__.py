"""Lock the pinned versions, and check pins, locks, licences and advisories."""
