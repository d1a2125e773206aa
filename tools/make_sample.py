#!/usr/bin/env python3
"""Write the sample corpus, a generated world with captions in English and Chinese."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import run_entry
from megatron_interbert.sample.corpus import run

if __name__ == "__main__":
    run_entry(run)
