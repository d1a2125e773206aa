"""Predict by arithmetic what a layout of devices takes: memory, communication, time."""
