"""Drop images that occur more than once in a build; the first one is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.shard_file import COLUMNS, OpenShard
from megatron_interbert.preparation.building.shard_writer import write_shard


def drop_duplicates(
    folder: Path, entries: list[dict[str, Any]], spelling: Callable[[str], str]
) -> tuple[list[dict[str, Any]], list[tuple[str, int, str]]]:
    """Return the entries of shards in which each image occurs once, and (shard, image in it, image
    id) of each image dropped. Ids with the same `spelling` are the same image.

    A changed shard is written under another name, so repeating this after a kill gives the same
    result.
    """
    seen: set[str] = set()
    kept_entries = []
    dropped = []

    for entry in entries:
        with Hdf5File(folder / entry["file"]) as file:
            ids = file.strings("image_ids")

        rows = []
        for row, name in enumerate(ids):
            if (key := spelling(name)) in seen:
                dropped.append((entry["file"], row, name))
            else:
                seen.add(key)
                rows.append(row)

        if len(rows) == len(ids):
            kept_entries.append(entry)
        elif rows:
            kept_entries.append(_write_rows(folder, entry, rows))

    return kept_entries, dropped


def _write_rows(folder: Path, entry: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Write a copy of a shard with only some of its images; return its manifest entry."""
    with Hdf5File(folder / entry["file"]) as file:
        width = file["image_features"].shape[1]

    shard = OpenShard(folder / entry["file"], entry, width)
    captions: dict[int, list[tuple[str, str]]] = {}
    for text, language, image in shard.captions():
        captions.setdefault(image, []).append((text, language))
    with shard.hdf5() as file:
        columns = {name: file[name][:] for name in COLUMNS}

    records = []
    for row in rows:
        start, stop = shard.ranges[row]
        arrays = {name: column[start:stop] for name, column in columns.items()}
        size = (float(shard.sizes[row, 0]), float(shard.sizes[row, 1]))
        labels = arrays["class_ids"], arrays["class_probs"]
        records.append(
            (
                Regions(
                    shard.ids[row], size, arrays["image_features"], arrays["image_bb"], *labels
                ),
                captions.get(row, []),
            )
        )

    shard.close()

    return write_shard(folder / entry["file"].replace(".h5", "-unique.h5"), records)
