"""Provide what lies between the disk and a PackedBatch: region store, sample order, text, masking,
packing.
"""
