#!/usr/bin/env python3
"""Convert weights between formats: official InterBERT, Hugging Face, BERT, our checkpoints."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.convert", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
