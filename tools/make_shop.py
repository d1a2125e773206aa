#!/usr/bin/env python3
"""Generate the sample shop in Chinese: made-up products, queries, topics and clicks of users."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.make_shop", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
