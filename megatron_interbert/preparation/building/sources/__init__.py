"""Read region features from their published formats, one module per format, from region stores, or
from photos by running a detector.
"""
