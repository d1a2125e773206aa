#!/usr/bin/env python3
"""Regenerate requirements/*.lock from requirements.txt with uv, against PyPI."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.locks.lock", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
