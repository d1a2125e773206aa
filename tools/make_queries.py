#!/usr/bin/env python3
"""Convert KDD Cup 2020 queries (Multimodalities Recall) to the JSON lines of product search."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.make_queries", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
