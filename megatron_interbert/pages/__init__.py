"""What result pages, reports and the service draw: photos, and regions where there are none."""
