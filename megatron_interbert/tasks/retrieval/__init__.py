"""Finetune and evaluate caption-based image retrieval: config, samples, job, pairs and tiles,
evaluation, page.
"""
