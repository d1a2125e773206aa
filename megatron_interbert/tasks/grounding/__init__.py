"""Share what tasks need that point at the region a text refers to."""
