"""Finetune and evaluate visual commonsense reasoning: config, samples, job, evaluation, page."""
