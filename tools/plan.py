#!/usr/bin/env python3
"""List the layouts of a model that fit the memory of a device, with their largest micro-batch."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.plan", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
