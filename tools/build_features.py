#!/usr/bin/env python3
"""Build a region store from published region features and caption files, or from other stores."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.build_features", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
