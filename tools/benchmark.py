#!/usr/bin/env python3
"""Measure ratios in one run on this machine."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.benchmarks.command", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
