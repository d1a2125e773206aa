#!/usr/bin/env python3
"""Finetune InterBERT's text path and transformers' BERT on a GLUE task with the same flags, data,
order and first weights.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "tools.studies.compare_glue", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
