"""Pretrain on captions, regions and questions."""
