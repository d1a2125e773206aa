"""Inspect a region store: counts, checks, and statistics that reveal wrong labels and boxes."""
