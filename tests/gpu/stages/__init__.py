"""What an acceptance run tries, a function each; see tests/gpu/acceptance.py for their order and limits."""
