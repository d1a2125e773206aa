#!/usr/bin/env python3
"""Mine hard negatives of a region store: captions of other images that are alike, but not too
alike.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.mine_negatives", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
