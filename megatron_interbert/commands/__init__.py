"""Commands beside the five entries: preparing data, converting weights, planning. One file each."""
