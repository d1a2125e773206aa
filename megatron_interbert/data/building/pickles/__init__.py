"""Pickles from strangers, decoded in a confined process of its own: reading.loads is all that others need."""
