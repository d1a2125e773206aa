"""Declare what commands can be told: options, settings of training runs, sizes of models."""
