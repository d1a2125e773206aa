"""Scores of all topics and items as Parquet: shared out over ranks, gone on with after a stop.

A part holds a run of items and all topics: columns topic_id, item_id, score. It appears whole; a part that is there is not scored again.
The folder remembers what it holds: other weights, data or settings are refused.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.config import read_json
from megatron_interbert.data.downstream.recommendation import read_topics
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.files import file_sha256, write_json
from megatron_interbert.parallel.agreement import together
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.task_config import ScoreTopicsConfig
from megatron_interbert.tasks.item_evaluation import open_items

PLAN = "_plan.json"  # readers of Parquet folders pass over names that begin so


def score_topics(config: ScoreTopicsConfig, state: ParallelState, device: torch.device) -> dict[str, Any]:
    """Writes OUTPUT/part-N.parquet; all ranks of a launch call it."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'megatron_interbert[serve]'") from None
    scorer, source, corpus, folder = open_items(config, state, device, [config.topics])
    topics, items = read_topics(config.topics, "--topics"), scorer.catalogue
    plan = {
        "weights": source.facts["files"],
        "store": [file_sha256(store.path / MANIFEST) for store in corpus.stores],
        "topics": file_sha256(config.topics),
        **{name: getattr(config, name) for name in ("titles", "max_regions", "max_tokens", "items_of_part", "precision")},
    }
    together(state, lambda: claim(folder, plan) if state.is_main else None)
    starts = list(range(0, len(items), config.items_of_part))
    missing = state.gather([start for start in starts if not part(folder, start).is_file()])[0]
    ids, pieces = np.array(items.ids), scorer.pieces(topics.texts)
    mine = missing[state.data_rank :: state.data_size]
    with (
        progress(total=len(missing), unit="part", desc="scoring", shown=state.is_main) as bar,
        local_errors(),
    ):
        for start in mine:
            numbers = np.arange(start, min(start + config.items_of_part, len(items)))
            text_of, item_of = np.repeat(np.arange(len(topics)), len(numbers)), np.tile(numbers, len(topics))
            scores = scorer.match(pieces, text_of, item_of)
            if not np.isfinite(scores).all():
                raise UsageError(f"{config.load}: scores are not finite; the weights have diverged, take an earlier checkpoint")
            if state.tensor_rank == 0:
                columns = {"topic_id": np.array(topics.ids)[text_of], "item_id": ids[item_of], "score": scores}
                beside = folder / f"_{part(folder, start).name}.{os.getpid()}.new"
                parquet.write_table(pyarrow.table(columns), beside)
                os.replace(beside, part(folder, start))
            bar.update(state.data_size)
    state.barrier()
    result = {"parts": len(starts), "pairs": len(topics) * len(items), "scored_now": len(missing), "folder": str(folder)}
    if state.is_main:
        print(f"{result['pairs']} pairs in {len(starts)} parts, {len(missing)} of them scored now: {folder}")
    return result


def part(folder: Path, start: int) -> Path:
    """The file of the items from `start` on."""
    return folder / f"part-{start:09d}.parquet"


def claim(folder: Path, plan: dict[str, Any]) -> None:
    """Note what the folder holds; UsageError where it holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PLAN).is_file():
        found = read_json(folder / PLAN, "--output")
        if different := [name for name in plan if json.loads(json.dumps(plan[name])) != found.get(name)]:
            raise UsageError(
                f"--output {folder}: holds scores of other {', '.join(different)}; choose another folder, or remove it"
            )
    else:
        write_json(folder / PLAN, plan)
    for left in folder.glob("*.new"):
        left.unlink(missing_ok=True)
