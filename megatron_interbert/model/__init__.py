"""Build InterBERT: embeddings, transformer layer, interaction and streams, heads, presets and
partition table.
"""
