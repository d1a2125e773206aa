"""Start and watch the processes of a run, set up their machines and compare these."""
