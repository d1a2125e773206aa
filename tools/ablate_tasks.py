#!/usr/bin/env python3
"""Measure on a generated world what parts of the pretraining and of the model are worth."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.studies.ablate_tasks", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
