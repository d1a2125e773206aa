"""Generated worlds to try everything out on: the sample corpus, the sample shop, and what is known
about them.
"""
