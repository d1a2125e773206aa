"""Measure the subjects of tools/benchmark.py, one file each."""
