"""What tools/benchmark.py measures, one file for each subject."""
