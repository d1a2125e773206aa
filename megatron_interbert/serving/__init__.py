"""Serve product search and recommendation: items, index, batching, HTTP, page."""
