#!/usr/bin/env python3
"""Measure what a model has learnt of the sample shop."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import run_entry
from megatron_interbert.sample.shop_report import run

if __name__ == "__main__":
    run_entry(run, reports=True)
