"""Samples of the downstream tasks: caption retrieval, VCR, GLUE."""
