#!/usr/bin/env python3
"""Find the images most similar to each image of a region store, for hard captions."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.mine_neighbours", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
