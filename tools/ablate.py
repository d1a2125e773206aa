#!/usr/bin/env python3
"""Run the paper's ablation: measure what each part of the pretraining and of the model is worth."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.studies.ablate", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
