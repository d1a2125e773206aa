"""Generate data to try everything out: the sample corpus and the sample shop, and figures about
them.
"""
