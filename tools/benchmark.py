#!/usr/bin/env python3
"""Measures ratios in one run on this machine.

    python tools/benchmark.py checkpoint --model base --output result.json   # what a save costs; speed of conversion
    python tools/benchmark.py data --output result.json                      # loader, building of stores, mining of negatives
    python tools/benchmark.py retrieval --vocab-file vocab.txt              # all pairs, against padded batches
    python tools/benchmark.py serve --load RUN --data-path STORE --queries queries.jsonl    # 512 clients of the service
    python tools/benchmark.py train --model base --batch 16                  # steps, against padded models and Hugging Face's

Figures of different machines or days do not compare; ratios within one run do.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import run_entry
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.parser import Parser
from megatron_interbert.weights.manifest import versions
from tools.benchmarks import checkpoint, data, retrieval, serve, train

SUBJECTS = {"checkpoint": checkpoint, "data": data, "retrieval": retrieval, "serve": serve, "train": train}


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, module in SUBJECTS.items():
        own = subjects.add_parser(name, help=module.__doc__.splitlines()[0])
        module.add_arguments(own)
        own.add_argument("--folder", help="disk to measure on; default: that of temporary files")
        own.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.output:
        check_output(arguments.output, "--output")
    result = {
        **SUBJECTS[arguments.subject].measure(arguments),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if arguments.output:
        write_output(arguments.output, json_text(result), "--output")


if __name__ == "__main__":
    run_entry(main)
