"""Score all topics and items, and write the scores as Parquet: distributed over ranks, resumable
after a stop.

A part holds a run of items and all topics, in the columns topic_id, item_id and score. Parts are
written atomically, and sound parts are not scored again. The folder and each part record what they
were made from: scores of other weights, data or settings are refused.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError, imports_of, local_errors
from megatron_interbert.files import file_sha256, flush_folder, json_sha256, whole_file, write_json
from megatron_interbert.parallel.agreement import some, together
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.reading import list_folder, read_json, reading
from megatron_interbert.tasks.shop.config import ScoreTopicsConfig
from megatron_interbert.tasks.shop.evaluation import open_items
from megatron_interbert.tasks.shop.scorer import ItemScorer
from megatron_interbert.tasks.shop.topic_samples import read_topics
from megatron_interbert.weights.sources import WeightSource

PLAN = "_plan.json"  # readers of Parquet folders skip names that begin with an underscore
PART = re.compile(r"part-[0-9]{9,}\.parquet")
UNFINISHED = re.compile(r"_part-[0-9]{9,}\.parquet\.[0-9]+\.new")
PLAN_SHA256 = b"megatron_interbert.plan_sha256"  # in the metadata of each part


def score_topics(
    config: ScoreTopicsConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write the parts OUTPUT/part-N.parquet that are missing, and return a summary.

    All ranks of a launch must call it.
    """
    check_parquet()
    scorer, source, corpus, folder = open_items(config, state, device, [config.topics])
    topics = read_topics(config.topics, "--topics")
    items = scorer.catalogue
    plan = plan_of(config, source, corpus)
    together(state, lambda: claim(folder, plan) if state.is_main else None)
    starts = range(0, len(items), config.items_of_part)
    rows_of = {
        start: len(topics) * min(config.items_of_part, len(items) - start) for start in starts
    }
    missing = together(
        state, lambda: missing_parts(folder, rows_of, digest_of(plan)) if state.is_main else None
    )
    missing = state.gather(missing)[0]
    topic_ids = np.array(topics.ids)
    item_ids = np.array(items.ids)
    pieces = scorer.pieces(topics.texts)
    mine = missing[state.data_rank :: state.data_size]

    with (
        progress(total=len(missing), unit="part", desc="scoring", shown=state.is_main) as bar,
        local_errors(),
    ):
        for start in mine:
            numbers = np.arange(start, min(start + config.items_of_part, len(items)))
            scores = score_items(scorer, pieces, numbers, config.load)
            if state.tensor_rank == 0:
                columns = {
                    "topic_id": np.repeat(topic_ids, len(numbers)),
                    "item_id": np.tile(item_ids[numbers], len(topics)),
                    "score": scores,
                }
                write_part(part(folder, start), columns, digest_of(plan))
            bar.update(state.data_size)

    if mine:
        flush_folder(folder)

    state.barrier()
    result = {
        "parts": len(starts),
        "pairs": len(topics) * len(items),
        "scored_now": len(missing),
        "folder": str(folder),
    }

    if state.is_main:
        print(
            f"{result['pairs']} pairs in {len(starts)} parts, {len(missing)} of them scored now:"
            f" {folder}"
        )

    return result


def score_items(
    scorer: ItemScorer, pieces: Sequence[np.ndarray], items: np.ndarray, load: str
) -> np.ndarray:
    """Score all topics against some items; return float32 [topics * items], topic by topic.

    Raises UsageError if a score is not finite.
    """
    text_of = np.repeat(np.arange(len(pieces)), len(items))
    item_of = np.tile(items, len(pieces))
    scores = scorer.match(pieces, text_of, item_of)
    if not np.isfinite(scores).all():
        raise UsageError(
            f"{load}: scores are not finite: the weights have diverged; use an earlier checkpoint"
        )

    return scores


def check_parquet() -> None:
    """Raise UsageError if pyarrow, which writes Parquet, cannot be imported."""
    with imports_of("serve", "Parquet"):
        import pyarrow.parquet  # noqa: F401


def plan_of(config: ScoreTopicsConfig, source: WeightSource, corpus: Corpus) -> dict[str, Any]:
    """Return everything that the scores depend on, to recognise parts of other runs."""
    names = ("titles", "max_regions", "max_tokens", "items_of_part", "precision")
    return {
        "weights": source.facts["files"],
        "store": [file_sha256(store.path / MANIFEST) for store in corpus.stores],
        "topics": file_sha256(config.topics),
        **{name: getattr(config, name) for name in names},
    }


def write_part(path: Path, columns: dict[str, np.ndarray], digest: bytes) -> None:
    """Write a part as Parquet, with the hash of its plan in the metadata."""
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table(columns, metadata={PLAN_SHA256: digest})
    beside = path.with_name(f"_{path.name}.{os.getpid()}.new")
    with whole_file(path, beside) as handle:
        parquet.write_table(table, handle, write_page_checksum=True)


def part(folder: Path, start: int) -> Path:
    """Return the path of the part whose first item is number `start`."""
    return folder / f"part-{start:09d}.parquet"


def digest_of(plan: dict[str, Any]) -> bytes:
    """Return the sha256 of a plan, in hex."""
    return json_sha256(plan).encode()


def claim(folder: Path, plan: dict[str, Any]) -> None:
    """Record the plan in the folder, and remove unfinished parts.

    Raises UsageError if it holds another plan, or parts without a plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list_folder(folder)
    if PLAN in names:
        found = read_json(folder / PLAN, "--output")
        if different := [
            name for name in plan if json.loads(json.dumps(plan[name])) != found.get(name)
        ]:
            raise UsageError(
                f"--output {folder}: holds scores of other {', '.join(different)}; choose another"
                " folder, or remove this one"
            )
    elif parts := [name for name in names if PART.fullmatch(name)]:
        raise UsageError(
            f"--output {folder}: holds {some(parts)}, but no {PLAN} that says which weights and"
            " data they are from; put it back, choose another folder, or remove them"
        )
    else:
        write_json(folder / PLAN, plan)

    for name in names:
        if UNFINISHED.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def missing_parts(folder: Path, rows_of: dict[int, int], digest: bytes) -> list[int]:
    """Return the first items of parts that are missing or damaged.

    Raises UsageError for a part of another plan.
    """
    missing = [
        start for start, rows in rows_of.items() if not is_whole(part(folder, start), rows, digest)
    ]
    again = [part(folder, start).name for start in missing if part(folder, start).exists()]
    if again:
        print(
            f"{folder}: parts that are damaged or of an earlier version are scored again:"
            f" {some(again)}",
            flush=True,
        )

    return missing


def is_whole(path: Path, rows: int, digest: bytes) -> bool:
    """Check whether a part exists, is sound and has `rows` rows.

    Raises UsageError if it is of another plan.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with reading(path), open(path, "rb") as handle:
            table = parquet.read_table(handle, page_checksum_verification=True)
    except UsageError:
        raise
    except (OSError, pyarrow.ArrowException):
        return False

    written_for = (table.schema.metadata or {}).get(PLAN_SHA256)
    if written_for is None:  # from an earlier version, which wrote no checksums either
        return False
    if written_for != digest:
        raise UsageError(
            f"{path}: holds scores of other weights, data or settings than {PLAN} records;"
            " choose another --output, or remove the file"
        )

    return table.num_rows == rows
