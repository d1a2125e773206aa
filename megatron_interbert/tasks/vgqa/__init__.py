"""Finetune and evaluate on the questions of Visual Genome, which each have one answer: config,
samples, job, evaluation.
"""
