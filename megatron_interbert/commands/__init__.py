"""Prepare data, convert weights, plan and report: the other commands of `interbert`, a file each."""
