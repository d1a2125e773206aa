#!/usr/bin/env python3
"""Find clusters of region features, which stand for classes where regions have none."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.cluster_features", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
