"""Write the result.json of an evaluation (metrics, protocol and everything they depend on), and
format the table that is printed from it.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.board import Board
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.files import file_sha256, write_json
from megatron_interbert.tasks.config import EvaluateConfig
from megatron_interbert.weights.manifest import versions
from megatron_interbert.weights.sources import WeightSource

# Published metrics of the official model, shown beside ours only if --benchmark says that the data
# are the same.
OFFICIAL = {
    ("flickr30k", "finetuned"): {"t2i_R@1": 61.9, "t2i_R@5": 87.1, "t2i_R@10": 92.7},
    ("flickr30k", "zero-shot"): {"t2i_R@1": 49.2, "t2i_R@5": 77.6, "t2i_R@10": 86.0},
    ("vcr", "finetuned"): {"q_a": 73.1, "qa_r": 74.8, "q_ar": 54.9},
}


def result_of(
    config: EvaluateConfig,
    protocol: str,
    metrics: dict[str, float],
    source: WeightSource,
    corpus: Corpus | None,
    files: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Return the record of an evaluation, for result.json.

    `metrics` are flat; `files` determine the samples, besides the stores of `corpus`; `more` is
    added as it is.
    """
    manifests = [store.manifest for store in corpus.stores] if corpus else []
    official = OFFICIAL.get((getattr(config, "benchmark", ""), protocol), {})

    return {
        "task": config.TASK,
        "protocol": protocol,
        "precision": config.precision,
        "metrics": metrics,
        **({"official": official} if official else {}),
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


def table(result: dict[str, Any]) -> str:
    """Return the metrics as a table, one per line, with the official ones beside them if known."""
    official = result.get("official", {})
    lines = [f"{'':<22}{'ours':>9}" + (f"{'official':>10}" if official else "")]

    for name, value in result["metrics"].items():
        beside = f"{official[name]:>10.1f}" if name in official else ""
        label = name if name.endswith("rank") else f"{name} %"
        lines.append(f"{label:<22}{value:>9.2f}{beside}")

    return "\n".join(lines)
