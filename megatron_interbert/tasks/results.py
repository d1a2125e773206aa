"""Write the result.json of an evaluation (metrics, protocol and everything they depend on), and
format the table that is printed from it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.board import Board
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.files import file_sha256, write_json, write_text
from megatron_interbert.tasks.baselines import baselines_of
from megatron_interbert.tasks.config import EvaluateConfig
from megatron_interbert.weights.manifest import versions
from megatron_interbert.weights.sources import WeightSource

NOT_PERCENT = ("rank", "distribution")  # ends of the names of figures


@dataclasses.dataclass(frozen=True)
class Published:
    """Hold the figures of a model, by the names of ours, on some part of a benchmark's data, and
    where they are published.
    """

    benchmark: str
    model: str
    figures: Mapping[str, float]
    source: str
    part: str = ""
    protocol: str = "finetuned"


def result_of(
    config: EvaluateConfig,
    protocol: str,
    metrics: dict[str, float],
    source: WeightSource,
    corpus: Corpus | None,
    files: Sequence[str] = (),
    published: Sequence[Published] = (),
    **more: Any,
) -> dict[str, Any]:
    """Return the record of an evaluation, for result.json.

    `metrics` are flat; `files` determine the samples, besides the stores of `corpus`. Of what is
    `published`, that of --benchmark is kept, which says that the data are the same; baselines are
    kept if they are known for these files. `more` is added as it is.
    """
    manifests = [store.manifest for store in corpus.stores] if corpus else []
    asked = getattr(config, "benchmark", ""), protocol
    beside = [
        *baselines_of(files, more.get("samples", 0)),
        *(dataclasses.asdict(p) for p in published if (p.benchmark, p.protocol) == asked),
    ]

    return {
        "task": config.TASK,
        "protocol": protocol,
        "precision": config.precision,
        "metrics": metrics,
        **({"beside": beside} if beside else {}),
        **more,
        "checkpoint": {
            "path": str(source.path),
            "format": source.kind,
            "iteration": source.facts.get("iteration"),
            "averaged": bool(source.facts.get("averaged")),
            "weights_sha256": source.facts["files"],
        },
        "data": {
            "files": {
                **{
                    str(store.path / MANIFEST): file_sha256(store.path / MANIFEST)
                    for store in (corpus.stores if corpus else [])
                },
                **{file: file_sha256(file) for file in files},
            },
            "detector": manifests[0]["detector"] if manifests else None,
            "generated": any(manifest.get("generated") for manifest in manifests),
        },
        "configuration": dataclasses.asdict(config),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def output_folder(config: EvaluateConfig, source: WeightSource) -> Path:
    """Return --output, else a folder beside the run's checkpoints (never inside one, because its
    files are hashed).
    """
    run = (
        source.path.parent if source.kind == "checkpoint" or source.path.is_file() else source.path
    )
    return Path(config.output) if config.output else run / "evaluation" / config.TASK


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json to a folder, and the metrics to TensorBoard files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", result)
    board = Board(folder / "tensorboard")

    try:
        board.write(
            result["checkpoint"]["iteration"] or 0,
            f"{result['task']}/{result['protocol']}",
            result["metrics"],
        )
    except OSError as error:
        print(
            f"note: {board.path} cannot be written ({error.strerror}); result.json has the metrics",
            flush=True,
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """Hold a file of an evaluation beside result.json: its name, what makes its text, what it is
    called where its path is printed, and whether it is asked for.
    """

    name: str
    text: Callable[[], str]
    label: str
    is_wanted: bool


def write_outputs(
    folder: Path,
    result: dict[str, Any],
    unlabelled: str,
    outputs: Sequence[Output],
) -> None:
    """Write result.json and further files to a folder, in this order; print the metrics, the note
    about samples without an answer (`unlabelled`, may be empty), and the path of each file.

    Files that are not wanted now, but that an earlier evaluation has left, are removed.
    """
    for output in outputs:
        path = folder / output.name
        if not output.is_wanted and path.is_file():
            path.unlink()
            print(f"removed: {path}, of an earlier evaluation")

    write_result(folder, result)
    print(table(result) if result["metrics"] else "no metrics computed")
    if unlabelled:
        print(unlabelled)

    print(f"result: {folder / 'result.json'}")
    for output in filter(lambda output: output.is_wanted, outputs):
        write_text(folder / output.name, output.text())
        print(f"{output.label}: {folder / output.name}")


def table(result: dict[str, Any]) -> str:
    """Return the metrics as a table, one per line, with baselines and published ones beside them
    and where these come from.
    """
    beside = result.get("beside", [])
    labels = {n: n if n.endswith(NOT_PERCENT) else f"{n} %" for n in result["metrics"]}
    first = max(21, *map(len, labels.values())) + 1
    widths = [max(len(peer["model"]), 6) + 2 for peer in beside]
    heads = "".join(f"{peer['model']:>{width}}" for peer, width in zip(beside, widths, strict=True))
    lines = [f"{'':<{first}}{'ours':>9}{heads}"]

    for name, value in result["metrics"].items():
        row = f"{labels[name]:<{first}}{value:>9.2f}"
        for peer, width in zip(beside, widths, strict=True):
            figure = peer["figures"].get(name)
            row += f"{'' if figure is None else f'{figure:.2f}':>{width}}"
        lines.append(row.rstrip())

    for peer in beside:
        part = f", {peer['part']}" if peer["part"] else ""
        lines.append(f"{peer['model']}{part}: {peer['source']}")

    return "\n".join(lines)
