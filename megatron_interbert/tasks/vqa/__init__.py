"""Finetune and evaluate visual question answering (VQA v2): config, samples, job, evaluation."""
