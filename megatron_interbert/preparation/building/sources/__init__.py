"""Readers of published region features: each file knows one format."""
