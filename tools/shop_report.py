#!/usr/bin/env python3
"""Report how well models search and recommend in the generated shop, beside TF-IDF and chance."""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.shop_report", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
