"""InterBERT: embeddings, one transformer layer class, interaction and streams, heads, presets,
partition table.
"""
