"""Engine, optimizer, checkpoints, metrics and the one loop.

Knows tasks only by their loss and report.
"""
