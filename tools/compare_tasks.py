#!/usr/bin/env python3
"""Finetune on each task of a generated world, alone and all at once, beside what one side tells."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.studies.compare_tasks", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
