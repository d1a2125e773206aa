"""Describe how the shards of a store are laid out on disk and what an image costs to read, and
measure how fast images are read here.
"""

import time
from typing import Any

import h5py
import numpy as np

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.shard_file import COLUMNS
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError


def describe_shards(store: RegionStore) -> list[dict[str, Any]]:
    """Describe each shard: file, counts, and datasets with shape, type and layout, or `error` if it
    cannot be opened.
    """
    described = []

    for entry in store.shards:
        row: dict[str, Any] = {
            name: entry[name] for name in ("file", "bytes", "images", "regions", "captions")
        }
        try:
            with Hdf5File(store.path / entry["file"]) as file:
                row["datasets"] = {name: _describe(file[name]) for name in file.names()}
        except UsageError as error:
            row["error"] = str(error)

        described.append(row)

    return described


def _describe(dataset: h5py.Dataset) -> dict[str, Any]:
    chunks = list(dataset.chunks) if dataset.chunks else None
    layout = "contiguous" if chunks is None else f"chunks of {' x '.join(map(str, chunks))}"
    if dataset.compression:
        layout += f", {dataset.compression}"

    kind = "string" if h5py.check_string_dtype(dataset.dtype) else str(dataset.dtype)

    return {
        "shape": list(dataset.shape),
        "dtype": kind,
        "layout": layout,
        "chunks": chunks,
        "compression": dataset.compression,
    }


def slow_reasons(shard: dict[str, Any]) -> list[str]:
    """List why reading an image of a shard takes more than one plain read per column; empty for
    shards that this package writes.
    """
    rows = shard["regions"] / max(shard["images"], 1)
    reasons = []

    for name, dtype in COLUMNS.items():
        dataset = shard["datasets"].get(name)
        if dataset is None:
            continue
        if dataset["dtype"] != np.dtype(dtype).name:
            reasons.append(
                f"{name} is {dataset['dtype']}: converted to {np.dtype(dtype).name} at every read"
            )

        if dataset["chunks"]:
            reasons.append(_chunk_cost(name, dataset, rows))

    return reasons


def _chunk_cost(name: str, dataset: dict[str, Any], rows: float) -> str:
    """Describe what HDF5 reads on average for an image of `rows` regions: whole chunks."""
    height, width = dataset["chunks"]
    chunks = (1 + max(rows - 1, 0) / height) * -(-dataset["shape"][1] // width)
    times = chunks * height * width / max(rows * dataset["shape"][1], 1)
    work = f"decompresses ({dataset['compression']})" if dataset["compression"] else "reads"

    return (
        f"{name} in {dataset['layout']}: an image of {rows:.0f} regions {work} about {chunks:.1f}"
        f" chunks, {times:.1f} times its bytes"
    )


def measure_reads(store: RegionStore, most: int = 300, seconds: float = 3.0) -> dict[str, float]:
    """Measure the images per second that one process reads, over up to `most` images in random
    order or `seconds`; bad records are skipped.
    """
    order = np.random.default_rng(0).permutation(store.num_images)[:most]
    done = 0
    begun = time.perf_counter()

    for number in order.tolist():
        try:
            store.read(number)
        except UsageError:
            continue

        done += 1
        if time.perf_counter() - begun > seconds:
            break

    elapsed = time.perf_counter() - begun

    return {
        "images": done,
        "seconds": round(elapsed, 4),
        "images_per_second": round(done / elapsed, 1) if done else 0.0,
    }
