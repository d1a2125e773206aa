"""Everything before training: building, inspecting and mining region stores.

Training does not import it.
"""
