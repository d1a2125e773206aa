#!/usr/bin/env python3
"""Write the sample shop, a generated world of products, queries, topics and clicks in Chinese."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import run_entry
from megatron_interbert.sample.shop import run

if __name__ == "__main__":
    run_entry(run)
