"""Fused operations.

Each has a plain twin of the same signature; `choice.choose_kernels` picks once per run.
"""
