"""Provide fused operations.

Each has a plain twin with the same signature; `choice.choose_kernels` picks once per run.
"""
