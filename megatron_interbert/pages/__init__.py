"""Draw photos and their regions for result pages, reports and the service."""
