#!/usr/bin/env python3
"""Which layouts of a model fit the memory of a device, and with how many samples at a time."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.plan", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
