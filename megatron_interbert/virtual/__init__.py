"""Rehearse ranks that this machine does not have, on tensors that have shapes and no content."""
