"""Decode foreign pickles in a confined process; the entry point is reading.loads."""
