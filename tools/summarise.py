#!/usr/bin/env python3
"""Summarise result.json files, such as seeds of one setting: mean and spread of each figure."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.summarise", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
