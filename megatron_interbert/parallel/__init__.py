"""Provide process groups, collectives with gradients, tensor-parallel layers, the
vocabulary-parallel loss and random streams.
"""
