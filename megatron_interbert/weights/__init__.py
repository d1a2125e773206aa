"""Weights on disk: files, manifests, and the formats of others; knows nothing of engines and
training.
"""
