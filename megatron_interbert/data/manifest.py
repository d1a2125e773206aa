"""Read and check `manifest.json` of a region store, and name the files of a store."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.files import encoded, file_sha256, is_plain_name, json_text
from megatron_interbert.reading import read_json, reading

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CAPTIONS = "captions.h5"
TOKENS = "tokens.h5"
VOCABULARY = "vocab.txt"
HARD_NEGATIVES = "hard_negatives.npy"  # captions near each caption
HARD_IMAGES = "hard_images.npy"  # images near each image
CLUSTERS = "clusters.npy"  # the cluster of each region
CENTROIDS = "centroids.safetensors"  # the middle of each cluster
REPORT = "dropped.jsonl"
PLAN = "plan.json"  # the settings of the build
REPEAT = (
    "find the clusters again with interbert cluster-features --overwrite, naming all stores that"
    " were clustered together"
)
REBUILD = "restore it or rebuild the store with interbert build-features"


@dataclass(frozen=True)
class Kind:
    """Describe what a field may be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _whole(least: int = 0, most: int = 1 << 53) -> Kind:
    return Kind(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _one_of(*choices: str) -> Kind:
    return Kind(" or ".join(choices), lambda value: value in choices)


def _is_a(kind: type, words: str) -> Kind:
    return Kind(words, lambda value: isinstance(value, kind))


WIDEST = 100_000  # classes of a detector, or entries of a feature vector: memory grows with both
TEXT = _is_a(str, "a text")
OBJECT = _is_a(dict, "an object")
TEXTS = Kind(
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
)
NEEDED = {
    "feature_dim": _whole(1, WIDEST),
    "num_classes": _whole(1, WIDEST),
    "detector": OBJECT,
    "shards": Kind(
        "a list of one or more files", lambda value: isinstance(value, list) and bool(value)
    ),
    "captions_file": OBJECT,
}
OPTIONAL = {  # older stores lack some of them
    "tokens_file": OBJECT,
    "label_width": _whole(1, WIDEST),
    "num_attributes": _whole(0, WIDEST),
    "class_names": TEXTS,
    "background_class": Kind(
        "a class or null", lambda value: value is None or _whole(0, WIDEST).fits(value)
    ),
    "text_normalisation": _one_of("none", "chinese"),
    "soft_labels": TEXT,
    "box_format": TEXT,
    "generated": _is_a(bool, "true or false"),
    "repaired_boxes": _whole(),
    "inverted_boxes": _whole(),
    "counts": OBJECT,
    "images_read": _whole(),
    "images_by_label_kind": OBJECT,
    "dropped": OBJECT,
    "captions_left_out": OBJECT,
    "clusters": OBJECT,
    "renamed_images": _whole(),
    "only_not_found": _whole(),
}
OF_FILES = {"file": TEXT, "bytes": _whole(), "sha256": TEXT}
OF_CLUSTERS = {
    "count": _whole(1, WIDEST),
    "regions": _whole(),
    "centroids": OBJECT,
    "origin": OBJECT,
}
COUNTED = ("images", "regions", "captions")


def sha256_of(store: Path, entry: dict[str, Any]) -> str:
    """Return the hex sha256 of a store's file; raise UsageError if the system cannot read it."""
    path = store / entry["file"]

    try:
        return file_sha256(path)
    except OSError as error:
        raise UsageError(_not_read(path, error)) from error


def read_manifest(store: Path) -> dict[str, Any]:
    """Read the manifest of a store; raise UsageError unless all its fields are of the right kind
    and every listed file exists with its listed size.
    """
    path = store / MANIFEST
    with reading(path):
        there = path.is_file()
    if not there:
        raise UsageError(
            f"{store}: no {MANIFEST} there, expected a region store (separate several with commas);"
            " make one with interbert build-features or interbert make-sample"
        )

    manifest = read_json(path, "region store")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version {version}, this version reads {SCHEMA_VERSION}; rebuild the"
            " store with interbert build-features"
        )

    _check_fields(manifest, NEEDED, str(path))
    _check_fields(
        manifest, {name: kind for name, kind in OPTIONAL.items() if name in manifest}, str(path)
    )
    _check_classes(manifest, str(path))

    if "clusters" in manifest:
        _check_fields(manifest["clusters"], OF_CLUSTERS, f"{path}: clusters")

    for entry in files_of(manifest):
        _check_fields(entry, OF_FILES, f"{path}: file entry")
        if not is_plain_name(entry["file"]):
            raise UsageError(
                f"{path}: file {entry['file'][:200]!r}, expected a name without folders; {REBUILD}"
            )

        _check_file(store, entry)

    for shard in manifest["shards"]:
        _check_fields(shard, _counts(shard), f"{path}: {shard['file']}")

    return manifest


def content_sha256(store: Path) -> str:
    """Return the sha256 of a store's manifest as it is without clusters, which may be found later
    and do not change what else the store holds.
    """
    manifest = read_json(store / MANIFEST, "region store")
    if manifest.pop("clusters", None) is None:
        return file_sha256(store / MANIFEST)
    return hashlib.sha256(encoded(json_text(manifest))).hexdigest()


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries (file, bytes, sha256) of all files of a store."""
    others = [manifest[name] for name in ("captions_file", "tokens_file") if name in manifest]
    clusters = [entry, entry["centroids"]] if (entry := manifest.get("clusters")) else []
    return [*manifest["shards"], *others, *clusters]


def entry_fits(shard: Any) -> bool:
    """Check whether a value is the entry of a shard, with all fields present and of their kinds."""
    if not isinstance(shard, dict) or not all(
        kind.fits(shard.get(name)) for name, kind in OF_FILES.items()
    ):
        return False

    return all(kind.fits(shard.get(name)) for name, kind in _counts(shard).items())


def _counts(shard: dict[str, Any]) -> dict[str, Kind]:
    """Return what the counts of a shard may be: it has no more images, regions or captions than
    bytes.
    """
    return dict.fromkeys(COUNTED, _whole(0, shard["bytes"]))


def _check_fields(values: Any, fields: dict[str, Kind], where: str) -> None:
    for name, kind in fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        if not kind.fits(value):
            raise UsageError(
                f"{where}: '{name}' is {str(value)[:60]!r}, expected {kind.words}; {REBUILD}"
            )


def _check_classes(manifest: dict[str, Any], where: str) -> None:
    """Raise UsageError if soft labels have more entries than there are classes, or the background
    is not one of the classes.
    """
    classes = manifest["num_classes"]
    if (
        manifest.get("label_width", 1) > classes
        or (manifest.get("background_class") or 0) >= classes
    ):
        raise UsageError(
            f"{where}: 'label_width' is {manifest.get('label_width')} and 'background_class'"
            f" {manifest.get('background_class')}, expected them to fit {classes} classes;"
            f" {REBUILD}"
        )


def how_to_mend(entry: dict[str, Any]) -> str:
    """Return what to do if the file of an entry is damaged or missing."""
    return REPEAT if entry["file"] in (CLUSTERS, CENTROIDS) else REBUILD


def _check_file(store: Path, entry: dict[str, Any]) -> None:
    path = store / entry["file"]
    mend = how_to_mend(entry)

    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: missing, but listed in {MANIFEST}; {mend}") from None
    except OSError as error:
        raise UsageError(_not_read(path, error)) from error

    if not stat.S_ISREG(facts.st_mode):
        raise UsageError(f"{path}: not a regular file, but listed in {MANIFEST}; {mend}")

    size = facts.st_size
    if size != entry["bytes"]:
        raise UsageError(f"{path}: {size} bytes, expected {entry['bytes']} (truncated?); {mend}")


def _not_read(path: Path, error: OSError) -> str:
    return (
        f"{path}: could not be read ({error.strerror}), which says nothing about its content; fix"
        " permissions, disk or limits and try again"
    )
