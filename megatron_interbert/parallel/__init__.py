"""Process groups, collectives with gradients, tensor-parallel layers, vocabulary-parallel loss,
random streams.
"""
