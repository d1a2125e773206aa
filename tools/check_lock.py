#!/usr/bin/env python3
"""Compare requirements/*.lock with requirements.txt and with the packages installed here."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.locks.check_lock", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
