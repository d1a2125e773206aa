"""What an acceptance run tries, a function each; tests/gpu/acceptance.py has order and limits."""
