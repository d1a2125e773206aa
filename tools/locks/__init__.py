"""The versions that are pinned and locked: making the locks, and checking pins, licences and
advisories.
"""
