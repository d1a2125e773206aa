"""Hold what tasks share that answer a question about images, or judge a statement about them, by
choosing one of fixed answers.
"""
