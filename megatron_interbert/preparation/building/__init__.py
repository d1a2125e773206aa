"""Making region stores: readers of every published format and of photos, writers, and the build
that survives kills.
"""
