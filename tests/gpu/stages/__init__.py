"""Define the stages of an acceptance run; tests/gpu/acceptance.py has their order and limits."""
