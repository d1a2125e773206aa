"""Measure ratios in one run on this machine.

    python tools/benchmark.py checkpoint --model base --output result.json
    python tools/benchmark.py data --output result.json
    python tools/benchmark.py experts --ranks 2
    python tools/benchmark.py layouts --ranks 2
    python tools/benchmark.py prepare --photos PHOTOS --detector DETECTOR
    python tools/benchmark.py retrieval --vocab-file vocab.txt
    python tools/benchmark.py serve --load RUN --data-path STORE --queries queries.jsonl
    python tools/benchmark.py train --model base --batch 16

Figures from different machines or days are not comparable; ratios within one run are.
"""

import dataclasses
import time
from pathlib import Path

from megatron_interbert.command_line import parse_task
from megatron_interbert.errors import run_entry
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.weights.manifest import versions
from tools.benchmarks import checkpoint, data, experts, layouts, prepare, retrieval, serve, train

SUBJECTS = {
    "checkpoint": (checkpoint.Options, checkpoint.measure),
    "data": (data.Options, data.measure),
    "experts": (experts.Options, experts.measure),
    "layouts": (layouts.Options, layouts.measure),
    "prepare": (prepare.Options, prepare.measure),
    "retrieval": (retrieval.Options, retrieval.measure),
    "serve": (serve.Options, serve.measure),
    "train": (train.Options, train.measure),
}


def run() -> None:
    """Measure one subject and write its figures."""
    options, measure = parse_task(SUBJECTS, "train --model base --batch 16")
    if options.output:
        check_output(Path(options.output), "--output")

    told = {name: str(value) for name, value in dataclasses.asdict(options).items()}
    result = {
        **measure(options),
        "arguments": told,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.output:
        write_output(Path(options.output), json_text(result), "--output")


def main() -> None:
    """Run the command."""
    run_entry(run)
