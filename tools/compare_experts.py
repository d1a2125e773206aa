#!/usr/bin/env python3
"""Compare experts with a dense model of the same work for each token."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.studies.compare_experts", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
