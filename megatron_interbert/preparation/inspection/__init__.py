"""Looking into a region store: counts, checks, and the statistics that betray wrong labels and
boxes.
"""
