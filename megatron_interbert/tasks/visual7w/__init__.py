"""Finetune and evaluate pointing in Visual7W: config, samples, job, evaluation."""
