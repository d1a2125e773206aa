"""Run the commands that prepare data, convert weights, plan and report, one file each."""
