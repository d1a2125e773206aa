#!/usr/bin/env python3
"""Rehearse a pretraining run of any size without its machines: shapes, memory, communication."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.dry_run", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
