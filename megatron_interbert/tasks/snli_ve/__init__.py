"""Finetune and evaluate SNLI-VE: config, samples, job, evaluation."""
