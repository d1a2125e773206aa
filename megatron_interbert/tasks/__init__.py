"""Define the tasks: each a loss and its metrics, which is all that the training loop sees."""
