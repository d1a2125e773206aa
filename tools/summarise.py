#!/usr/bin/env python3
"""Mean and spread of several results (seeds of one setting): each figure over result.json files."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.summarise", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
