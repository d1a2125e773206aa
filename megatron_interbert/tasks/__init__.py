"""A task is a model with its loss and its metrics; the training loop knows no more than that."""
