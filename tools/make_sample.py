#!/usr/bin/env python3
"""Generate the sample corpus: a made-up world with captions in English and Chinese, to try things
out.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    checkout = Path(__file__).resolve().parents[1]
    command = {"MODULE": "megatron_interbert.commands.make_sample", "TOOL": __file__}
    run_path(str(checkout / "launchers/checkout.py"), command)
