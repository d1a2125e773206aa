"""Finetune and evaluate on GLUE, using the text path alone: config, samples, job, evaluation."""
