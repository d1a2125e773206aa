"""Training of InterBERT (arXiv 2003.13198), a vision-and-language encoder over region features, on the DeepSpeed engine."""

__version__ = "0.1.0"
