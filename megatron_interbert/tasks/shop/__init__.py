"""Finetune and evaluate product search and topic-based recommendation: config, catalogue, samples,
jobs, scorer, evaluation, page.
"""
