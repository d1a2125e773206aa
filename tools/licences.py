#!/usr/bin/env python3
"""List the licence of everything in requirements/*.lock, and check the list."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.locks.licences", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
