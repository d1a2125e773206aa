"""Write shards of a build again without some of their images, or with other names or captions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.shard_file import COLUMNS, OpenShard
from megatron_interbert.preparation.building.joining import MERGED, Change, Decision
from megatron_interbert.preparation.building.shard_writer import Caption, write_shard


def keep_captions(folder: Path, entries: list[dict[str, Any]], decision: Decision) -> None:
    """Give the captions of images that are dropped as repeated to the first of them."""
    rows = {row for first, later in decision.repeated.items() for row in (first, *later)}
    captions = _captions_of_rows(folder, entries, rows)

    for first, later in decision.repeated.items():
        known = list(captions.get(first, []))
        for row in later:
            if captions.get(row):
                decision.changes[row].reason = MERGED
                known += [caption for caption in captions[row] if caption not in known]

        if len(known) > len(captions.get(first, [])):
            decision.changes.setdefault(first, Change()).captions = known


def _captions_of_rows(
    folder: Path, entries: list[dict[str, Any]], rows: set[int]
) -> dict[int, list[Caption]]:
    """Return the captions of some images by their numbers in all shards together."""
    found: dict[int, list[Caption]] = {}
    first = 0

    for entry in entries:
        if any(row in rows for row in range(first, first + entry["images"])):
            with Hdf5File(folder / entry["file"]) as file:
                width = file["image_features"].shape[1]
            shard = OpenShard(folder / entry["file"], entry, width)
            for text, language, image in shard.captions():
                if first + image in rows:
                    found.setdefault(first + image, []).append((text, language))
            shard.close()
        first += entry["images"]

    return found


def change_shards(
    folder: Path, entries: list[dict[str, Any]], changes: Mapping[int, Change]
) -> list[dict[str, Any]]:
    """Return the manifest entries of shards after the changes to their images, by their numbers in
    all shards together.

    A changed shard is written under another name, so repeating this after a kill gives the same
    result.
    """
    changed = []
    first = 0

    for entry in entries:
        own = {
            row: changes[first + row] for row in range(entry["images"]) if first + row in changes
        }
        first += entry["images"]

        if not own:
            changed.append(entry)
        elif any(row not in own or not own[row].reason for row in range(entry["images"])):
            changed.append(_write_again(folder, entry, own))

    return changed


def _write_again(
    folder: Path, entry: dict[str, Any], changes: Mapping[int, Change]
) -> dict[str, Any]:
    """Write the images of a shard that stay, as they are to be; return the manifest entry."""
    with Hdf5File(folder / entry["file"]) as file:
        width = file["image_features"].shape[1]

    shard = OpenShard(folder / entry["file"], entry, width)
    captions: dict[int, list[Caption]] = {}
    for text, language, image in shard.captions():
        captions.setdefault(image, []).append((text, language))
    with shard.hdf5() as file:
        columns = {name: file[name][:] for name in COLUMNS}

    records = []
    for row, image_id in enumerate(shard.ids):
        change = changes.get(row, Change())
        if change.reason:
            continue

        start, stop = shard.ranges[row]
        arrays = {name: column[start:stop] for name, column in columns.items()}
        regions = Regions(
            image_id if change.name is None else change.name,
            (float(shard.sizes[row, 0]), float(shard.sizes[row, 1])),
            arrays["image_features"],
            arrays["image_bb"],
            arrays["class_ids"],
            arrays["class_probs"],
        )
        records.append(
            (regions, captions.get(row, []) if change.captions is None else change.captions)
        )

    shard.close()

    return write_shard(folder / entry["file"].replace(".h5", "-joined.h5"), records)
