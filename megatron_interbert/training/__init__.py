"""Train: engine, optimizer, checkpoints, metrics and the one training loop.

Tasks are known here only by their loss and report.
"""
