"""Region store, order, text, masking, packing: everything between the disk and a PackedBatch."""
