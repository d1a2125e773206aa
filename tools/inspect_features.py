#!/usr/bin/env python3
"""Inspect a region store before training on it: what it holds, what is wrong, how to fix it."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.inspect_features", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
