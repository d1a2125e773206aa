"""Build region stores: readers of every published format and of photos, detectors, writers, and a
build that can be resumed after a kill.
"""
