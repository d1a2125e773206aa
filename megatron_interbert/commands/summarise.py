"""Summarise result.json files, such as seeds of one setting: mean and spread of each figure.

interbert summarise runs/seed-*/evaluation/retrieval/result.json
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.reading import read_json

# keys that results must share, with the value that older results without the key stand for
SAME = {"task": "", "protocol": "", "precision": "fp32"}
DECIDING = (
    "language",
    "max_images",
    "max_regions",
    "max_tokens",
    "max_rationale_tokens",
    "split",
)
COLUMNS = ("mean", "spread", "least", "most")


@dataclass
class Options(Flags):
    """Hold the flags of summarise."""

    GROUP: ClassVar[str] = "data"

    results: list[str] = argument("result.json files of evaluations", several=True)
    output: str = option("", "JSON file for the table")


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return {figure: {mean, spread, least, most}} over results.

    The spread is the sample standard deviation, 0 for a single result.
    """
    figures = {}

    for name in results[0]["metrics"]:
        values = [result["metrics"][name] for result in results]
        figures[name] = {
            "mean": statistics.mean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "least": min(values),
            "most": max(values),
        }

    return figures


def is_result(result: dict[str, Any]) -> bool:
    """Check whether JSON has the form of an evaluation's result: task, figures, data, settings."""
    metrics = result.get("metrics")
    data = result.get("data", {})
    if not isinstance(metrics, dict) or not isinstance(data, dict):
        return False

    named = all(isinstance(result.get(name), str) for name in ("task", "protocol"))
    figures = bool(metrics) and all(type(value) in (int, float) for value in metrics.values())
    files = data.get("files", {})
    hashed = isinstance(files, dict) and all(isinstance(value, str) for value in files.values())

    return named and figures and hashed and isinstance(result.get("configuration", {}), dict)


def deciding(result: dict[str, Any]) -> list[Any]:
    """Return the hashes of the data, whatever their paths, and the settings that decide samples."""
    settings = result.get("configuration", {})
    hashes = sorted(result.get("data", {}).get("files", {}).values())
    return [hashes, *(settings.get(name) for name in DECIDING)]


def check_alike(paths: list[str], results: list[dict[str, Any]]) -> None:
    """Raise UsageError for a result that cannot be averaged with the first."""
    first = results[0]

    for path, result in zip(paths, results, strict=True):
        if not is_result(result):
            raise UsageError(f"{path}: not a result; give the result.json of an evaluation")
        for name, earlier in SAME.items():
            here = result.get(name, earlier)
            there = first.get(name, earlier)
            if here != there:
                raise UsageError(
                    f"{path}: {name} is {here}, the first has {there}; they cannot be averaged"
                )

        if deciding(result) != deciding(first):
            raise UsageError(
                f"{path}: evaluated on other data or with other limits than {paths[0]}; they cannot"
                " be averaged"
            )

        if result["metrics"].keys() != first["metrics"].keys():
            raise UsageError(
                f"{path}: has figures {', '.join(result['metrics'])}; {paths[0]} has others; they"
                " cannot be averaged"
            )


def run(options: Options) -> None:
    """Read the results, check that they can be averaged, and print the table."""
    if options.output:
        check_output(Path(options.output), "--output")

    results = [read_json(path, "result") for path in options.results]
    check_alike(options.results, results)

    table = summarise(results)
    print(f"{results[0]['task']}, {results[0]['protocol']}, {len(results)} results")
    print(f"{'':<18}" + "".join(f"{column:>9}" for column in COLUMNS))
    for name, row in table.items():
        print(f"{name:<18}" + "".join(f"{row[column]:>9.2f}" for column in COLUMNS))
    if options.output:
        found = json_text({"results": options.results, "figures": table})
        write_output(Path(options.output), found, "--output")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run, reports=True)
