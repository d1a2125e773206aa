"""Share what tasks need that answer a question, or judge a statement, about images by choosing from
a fixed list of answers.
"""
