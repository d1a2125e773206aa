"""Finetune and evaluate NLVR2: config, samples, job with its metrics, evaluation."""
