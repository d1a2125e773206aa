#!/usr/bin/env python3
"""Print the known advisories (CVEs, ..) of every version in requirements/*.lock."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.locks.audit", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
