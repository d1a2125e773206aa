"""Finetune and evaluate GQA: config, samples, job with its metrics, evaluation."""
