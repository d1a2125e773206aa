"""Product search and recommendation as a service: items, index, batching, HTTP, page."""
