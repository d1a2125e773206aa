"""Finetune and evaluate grounding of phrases in Flickr30k Entities: config, samples, job,
evaluation.
"""
