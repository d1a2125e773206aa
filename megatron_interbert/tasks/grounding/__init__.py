"""Hold what tasks share that point at the region which a text means."""
