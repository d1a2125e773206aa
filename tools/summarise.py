#!/usr/bin/env python3
"""Mean and spread of several results (seeds of one setting): a table of each figure over the result.json files given.

python tools/summarise.py runs/seed-*/evaluation/retrieval/result.json
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.parser import Parser
from megatron_interbert.reading import read_json

SAME = {"task": "", "protocol": "", "precision": "fp32"}  # with what earlier results mean that lack it


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{figure: {mean, spread, least, most}} over results; the spread is the sample's standard deviation, 0 of one alone."""
    figures = {}
    for name in results[0]["metrics"]:
        values = [result["metrics"][name] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures[name] = {"mean": statistics.mean(values), "spread": spread, "least": min(values), "most": max(values)}
    return figures


def is_result(result: dict[str, Any]) -> bool:
    """Whether it is what an evaluation writes: its task, figures, and what they were made on."""
    metrics, data = result.get("metrics"), result.get("data", {})
    if not isinstance(metrics, dict) or not isinstance(data, dict):
        return False

    named = all(isinstance(result.get(name), str) for name in ("task", "protocol"))
    figures = bool(metrics) and all(type(value) in (int, float) for value in metrics.values())
    files = data.get("files", {})
    hashed = isinstance(files, dict) and all(isinstance(value, str) for value in files.values())
    return named and figures and hashed and isinstance(result.get("configuration", {}), dict)


def deciding(result: dict[str, Any]) -> list[Any]:
    """Hashes of the data, wherever they lie, and the settings on which the samples depend."""
    settings = result.get("configuration", {})
    names = ("language", "max_images", "max_regions", "max_tokens", "max_rationale_tokens", "split")
    return [sorted(result.get("data", {}).get("files", {}).values()), *(settings.get(name) for name in names)]


def run() -> None:
    """Read, check that they are of one kind, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="result.json files of evaluations")
    parser.add_argument("--output", help="JSON file for the table")
    options = parser.parse_args()
    if options.output:
        check_output(Path(options.output), "--output")
    results = [read_json(path, "result") for path in options.results]
    for path, result in zip(options.results, results, strict=True):
        if not is_result(result):
            raise UsageError(f"{path}: no figures in it; give the result.json of an evaluation")
        for name, earlier in SAME.items():
            here, first = (each.get(name, earlier) for each in (result, results[0]))
            if here != first:
                raise UsageError(f"{path}: {name} is {here}, the first has {first}; they do not average")
        if deciding(result) != deciding(results[0]):
            raise UsageError(f"{path}: evaluated on other data or with other limits than {options.results[0]}; they do not average")
        if result["metrics"].keys() != results[0]["metrics"].keys():
            raise UsageError(f"{path}: has figures {', '.join(result['metrics'])}; {options.results[0]} has others")
    table = summarise(results)
    print(f"{results[0]['task']}, {results[0]['protocol']}, {len(results)} results")
    print(f"{'':<18}{'mean':>9}{'spread':>9}{'least':>9}{'most':>9}")
    for name, row in table.items():
        print(f"{name:<18}" + "".join(f"{row[column]:>9.2f}" for column in ("mean", "spread", "least", "most")))
    if options.output:
        found = json_text({"results": options.results, "figures": table})
        write_output(Path(options.output), found, "--output")


if __name__ == "__main__":
    run_entry(run, reports=True)
