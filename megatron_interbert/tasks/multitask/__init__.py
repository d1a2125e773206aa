"""Finetune on several tasks at once: one trunk, a head for each task, one task a step."""
