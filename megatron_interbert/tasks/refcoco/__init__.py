"""Finetune and evaluate referring expressions (RefCOCO, RefCOCO+, RefCOCOg): config, samples, job,
evaluation.
"""
