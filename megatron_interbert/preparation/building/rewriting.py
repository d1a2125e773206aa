"""Write shards of a build again without some of their images, or with other names or captions."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.shard_file import ATTRIBUTES, COLUMNS, OpenShard
from megatron_interbert.preparation.building.joining import AGAIN, MERGED, Change, Decision
from megatron_interbert.preparation.building.shard_writer import Caption, write_shard


def settle_repeated(
    folder: Path, entries: list[dict[str, Any]], decision: Decision, captions: bool
) -> None:
    """Tell the images that come again as they were, which are no fault, from others of their id;
    and if asked, give the `captions` of those that are dropped to the first of them.
    """
    rows = {row for first, later in decision.repeated.items() for row in (first, *later)}
    seen = _look_up(folder, entries, rows)

    for first, later in decision.repeated.items():
        known = list(seen[first].captions)
        for row in later:
            if seen[row].digest != seen[first].digest:
                continue

            decision.changes[row].reason = AGAIN
            if captions and seen[row].captions:
                decision.changes[row].reason = MERGED
                known += [caption for caption in seen[row].captions if caption not in known]

        if len(known) > len(seen[first].captions):
            decision.changes.setdefault(first, Change()).captions = known


@dataclass
class _Seen:
    """Hold what is compared of an image: its captions, and a digest of its regions."""

    digest: bytes
    captions: list[Caption]


def _look_up(folder: Path, entries: list[dict[str, Any]], rows: set[int]) -> dict[int, _Seen]:
    """Return what is compared of some images, by their numbers in all shards together."""
    found: dict[int, _Seen] = {}
    first = 0

    for entry in entries:
        own = sorted(rows & set(range(first, first + entry["images"])))
        if own:
            with Hdf5File(folder / entry["file"]) as file:
                ranges = file["pos_boxes"][:]
                for row in own:
                    digest = hashlib.blake2b(digest_size=16)
                    for name in columns_of(file):
                        digest.update(file[name][slice(*ranges[row - first])].tobytes())
                    found[row] = _Seen(digest.digest(), [])

                texts = (file.strings("caption_text"), file.strings("caption_language"))
                for text, language, image in zip(*texts, file["caption_image"][:], strict=True):
                    if first + int(image) in found:
                        found[first + int(image)].captions.append((text, language))
        first += entry["images"]

    return found


def columns_of(file: Hdf5File) -> list[str]:
    """Return the columns of a shard."""
    return [*COLUMNS, *(name for name in ATTRIBUTES if name in file)]


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
        columns = {name: file[name][:] for name in columns_of(file)}

    attributes = ATTRIBUTES.keys() <= columns.keys()
    shard = OpenShard(folder / entry["file"], entry, width, attributes=attributes)
    captions: dict[int, list[Caption]] = {}
    for text, language, image in shard.captions():
        captions.setdefault(image, []).append((text, language))

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
            *(arrays.get(name) for name in ATTRIBUTES),
        )
        records.append(
            (regions, captions.get(row, []) if change.captions is None else change.captions)
        )

    shard.close()

    return write_shard(folder / entry["file"].replace(".h5", "-joined.h5"), records)
