"""Processes and the machines they run on: memory, threads, start and end, and whether all machines
are alike.
"""
