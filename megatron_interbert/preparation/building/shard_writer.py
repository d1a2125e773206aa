"""Write the files of a region store: one shard at a time, then the caption and token files over all
of them.

Every file is written under a temporary name, flushed and renamed, so a file under its final name is
complete.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.manifest import CAPTIONS, TOKENS
from megatron_interbert.data.regions import Regions, record_problem, repair_boxes
from megatron_interbert.data.shard_file import ATTRIBUTES, COLUMNS
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.files import write_by_name

Caption = tuple[str, str]  # text, language tag
SHARD_NAME = "shard-{:05d}.h5"
BOX_ROUNDING = 0.01  # pixels: corners swapped by no more count as rounding, not as inverted


@dataclass
class Prepared:
    """Hold a record ready to be stored, and how many of its boxes were repaired and inverted.

    `problem` says why it cannot be stored; empty if it can.
    """

    regions: Regions
    repaired: int = 0
    inverted: int = 0
    problem: str = ""
    details: str = ""


def prepare_record(
    regions: Regions, feature_dim: int, num_classes: int, num_attributes: int = 0
) -> Prepared:
    """Check one image and convert it to the stored form: float16 features, boxes sorted and
    clipped.
    """
    if not storable(regions.image_id):
        return Prepared(
            regions, problem="image id is not valid text", details=repr(regions.image_id[:80])
        )

    rows = len(regions.features)
    for name, shape in (
        ("features", (rows, feature_dim)),
        ("boxes", (rows, 4)),
        ("class_probs", regions.class_ids.shape),
    ):
        if getattr(regions, name).shape != shape:
            return Prepared(
                regions,
                problem=f"{name} of a wrong shape",
                details=f"{getattr(regions, name).shape}, expected {shape}",
            )

    if rows == 0:
        return Prepared(regions, problem="no regions")
    if regions.class_ids.shape[:1] != (rows,) or regions.class_ids.ndim != 2:
        return Prepared(
            regions,
            problem="class ids of a wrong shape",
            details=f"{regions.class_ids.shape}, expected ({rows}, k)",
        )

    boxes = np.asarray(regions.boxes, dtype=np.float32)
    with np.errstate(over="ignore"):  # values beyond float16 become infinite and are refused
        features = regions.features.astype(np.float16)

    ready = Regions(
        regions.image_id,
        regions.size,
        features,
        boxes,
        regions.class_ids,
        regions.class_probs,
        *((regions.attribute_ids, regions.attribute_probs) if num_attributes else ()),
    )
    problem = record_problem(ready, num_classes, num_attributes)
    if problem:
        kind, _, details = problem.partition("; ")
        return Prepared(regions, problem=kind, details=details)

    inverted = int(((boxes[:, 2:] + BOX_ROUNDING < boxes[:, :2]).any(axis=1)).sum())
    ready.boxes, repaired = repair_boxes(boxes, ready.size)

    return Prepared(ready, repaired, inverted)


def storable(name: str) -> bool:
    """Check whether HDF5 and SQLite can hold a string: not empty, without NUL and lone
    surrogates.
    """
    try:
        return bool(name.encode("utf-8")) and "\0" not in name
    except UnicodeEncodeError:
        return False


def write_shard(path: Path, records: Sequence[tuple[Regions, Sequence[Caption]]]) -> dict[str, Any]:
    """Write one shard of prepared images and their captions; return its manifest entry."""
    counts: dict[str, int] = {}

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w", libver="earliest") as file:
            counts.update(_fill_shard(file, records))

    strings = [
        text
        for regions, captions in records
        for text in (regions.image_id, *(part for c in captions for part in c))
    ]
    arrays = (
        array
        for regions, _ in records
        for array in vars(regions).values()
        if isinstance(array, np.ndarray)
    )

    return {
        **write_by_name(path, write, sum(array.nbytes for array in arrays) + _heap_bytes(strings)),
        **counts,
    }


def _heap_bytes(strings: Sequence[str]) -> int:
    """Estimate generously the bytes that HDF5 needs for strings and for itself."""
    return 2 * sum(len(text.encode()) + 32 for text in strings) + (1 << 16)


def _fill_shard(
    file: h5py.File, records: Sequence[tuple[Regions, Sequence[Caption]]]
) -> dict[str, int]:
    ends = np.cumsum([len(regions.features) for regions, _ in records])
    starts = np.concatenate([[0], ends[:-1]])
    first = records[0][0]
    widths = {
        "image_features": ("features", first.features.shape[1]),
        "image_bb": ("boxes", 4),
        "class_ids": ("class_ids", first.class_ids.shape[1]),
        "class_probs": ("class_probs", first.class_ids.shape[1]),
    }
    if first.attribute_ids is not None:
        widths |= {name: (name, 1) for name in ATTRIBUTES}

    for name, (field, width) in widths.items():  # contiguous: the regions of one image are one read
        dtype = (COLUMNS | ATTRIBUTES)[name]
        dataset = file.create_dataset(name, (int(ends[-1]), width), dtype)
        for (regions, _), start, end in zip(records, starts, ends, strict=True):
            dataset[start:end] = getattr(regions, field)

    file["pos_boxes"] = np.stack([starts, ends], axis=1).astype(np.int64)
    file["image_sizes"] = np.array([regions.size for regions, _ in records], dtype=np.float32)
    texts = [
        (text, language, row)
        for row, (_, captions) in enumerate(records)
        for text, language in captions
    ]
    strings = h5py.string_dtype()

    for name, values in (
        ("image_ids", [regions.image_id for regions, _ in records]),
        ("caption_text", [text for text, _, _ in texts]),
        ("caption_language", [language for _, language, _ in texts]),
    ):
        file.create_dataset(name, (len(values),), strings, data=values)

    file["caption_image"] = np.array([row for _, _, row in texts], dtype=np.int64)

    return {"images": len(records), "regions": int(ends[-1]), "captions": len(texts)}


def write_caption_file(folder: Path, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the caption file over all shards of a folder, one shard in memory at a time; return its
    manifest entry.
    """
    languages = set()
    total_bytes = 0

    for shard in shards:
        with Hdf5File(folder / shard["file"]) as file:
            total_bytes += sum(len(text.encode()) for text in file.strings("caption_text"))
            languages |= set(file.strings("caption_language"))

    names = sorted(languages) or [""]
    captions, images = (sum(shard[kind] for shard in shards) for kind in ("captions", "images"))

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w", libver="earliest") as file:
            file.create_dataset("text", (total_bytes,), np.uint8)
            file.create_dataset("offsets", (captions + 1,), np.int64)
            file.create_dataset("image", (captions,), np.int64)
            file.create_dataset("language", (captions,), np.int16)
            file.create_dataset("image_regions", (images,), np.int32)
            file.attrs["languages"] = names
            place = {"text": 0, "caption": 0, "image": 0}
            for shard in shards:
                _append_captions(file, folder / shard["file"], names, place)

    return write_by_name(
        folder / CAPTIONS, write, total_bytes + 18 * captions + 4 * images + (1 << 16)
    )


def _append_captions(
    target: h5py.File, shard: Path, names: list[str], place: dict[str, int]
) -> None:
    with Hdf5File(shard) as file:
        texts = [text.encode() for text in file.strings("caption_text")]
        ranges = file["pos_boxes"][:]
        start = place["caption"]
        captions = len(texts)
        images = len(ranges)
        ends = place["text"] + np.cumsum([len(t) for t in texts], dtype=np.int64)
        target["text"][place["text"] : place["text"] + sum(map(len, texts))] = np.frombuffer(
            b"".join(texts), np.uint8
        )
        target["offsets"][start + 1 : start + captions + 1] = ends
        target["image"][start : start + captions] = file["caption_image"][:] + place["image"]
        tags = file.strings("caption_language")
        target["language"][start : start + captions] = np.array(
            [names.index(tag) for tag in tags], dtype=np.int16
        )
        target["image_regions"][place["image"] : place["image"] + images] = (
            ranges[:, 1] - ranges[:, 0]
        )
        place["text"] += sum(map(len, texts))
        place["caption"] += captions
        place["image"] += images


def write_token_file(
    folder: Path, captions: Iterable[list[str]], count: int, tokenizer: CaptionTokenizer
) -> dict[str, Any]:
    """Write all `count` captions, given in groups in the store's order, as token ids, so that
    training need not tokenise; return the file's manifest entry.
    """
    with tempfile.TemporaryFile(dir=folder) as ids, tempfile.TemporaryFile(dir=folder) as starts:
        offsets = np.zeros(count + 1, np.int64)
        done = 0

        for group in captions:
            encoded = tokenizer.encode_batch(group)
            ids.write(encoded.ids.tobytes())
            starts.write(encoded.word_starts.tobytes())
            offsets[done + 1 : done + len(group) + 1] = offsets[done] + encoded.offsets[1:]
            done += len(group)

        tokens = int(offsets[-1])

        def write(temporary: Path) -> None:
            with h5py.File(temporary, "w", libver="earliest") as file:
                file["offsets"] = offsets
                _copy_into(file.create_dataset("ids", (tokens,), np.int32), ids)
                _copy_into(file.create_dataset("word_starts", (tokens,), np.uint8), starts)
                file.attrs["vocabulary"] = tokenizer.sha256

        return write_by_name(folder / TOKENS, write, 5 * tokens + offsets.nbytes + (1 << 16))


def _copy_into(dataset: h5py.Dataset, spool: IO[bytes], step: int = 1 << 22) -> None:
    """Fill a contiguous dataset, whose size is known only at the end, from raw bytes spooled to
    disk, `step` elements at a time.
    """
    spool.seek(0)
    for start in range(0, len(dataset), step):
        part = np.frombuffer(spool.read(step * dataset.dtype.itemsize), dataset.dtype)
        dataset[start : start + len(part)] = part
