#!/usr/bin/env python3
"""Compare the pins of requirements.txt with what others get from PyPI, and with one another."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.locks.check_pins", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
