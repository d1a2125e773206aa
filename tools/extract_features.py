#!/usr/bin/env python3
"""Turn a folder of photos into a region store with an object detector."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.extract_features", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
