"""`manifest.json` of a region store: names of the files, reading and checking."""

import os
import stat
from pathlib import Path
from typing import Any

from megatron_interbert.config import read_json
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256, is_plain_name, reading

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CAPTIONS = "captions.h5"
TOKENS = "tokens.h5"
VOCABULARY = "vocab.txt"
HARD_NEGATIVES = "hard_negatives.npy"  # captions near each caption
HARD_IMAGES = "hard_images.npy"  # images near each image
REPORT = "dropped.jsonl"
PLAN = "plan.json"  # what a build was asked for
REBUILD = "restore it or rebuild the store with tools/build_features.py"
FIELDS = {"feature_dim": int, "num_classes": int, "detector": dict, "shards": list, "captions_file": dict}
FILE_FIELDS = {"file": str, "bytes": int, "sha256": str}
SHARD_FIELDS = {**FILE_FIELDS, "images": int, "regions": int, "captions": int}


def sha256_of(store: Path, entry: dict[str, Any]) -> str:
    """Hex sha256 of a file of a store; UsageError when the system does not let it be read, which is no damage."""
    path = store / entry["file"]
    try:
        return file_sha256(path)
    except OSError as error:
        raise UsageError(_not_read(path, error)) from error


def read_manifest(store: Path) -> dict[str, Any]:
    """The manifest of a store with all its fields of the right kind, and every file of it there with its size."""
    path = store / MANIFEST
    with reading(path):
        there = path.is_file()
    if not there:
        raise UsageError(
            f"{store}: no {MANIFEST} there, expected a region store (commas stand between several); make one with"
            " tools/build_features.py or tools/make_sample.py"
        )
    manifest = read_json(path, "region store")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version {version}, this version reads {SCHEMA_VERSION}; rebuild the store with tools/build_features.py"
        )
    _check_fields(manifest, FIELDS, str(path))
    for shard in manifest["shards"]:
        _check_fields(shard, SHARD_FIELDS, f"{path}: shards")
    for entry in files_of(manifest):
        _check_fields(entry, FILE_FIELDS, f"{path}: file entry")
        if not is_plain_name(entry["file"]):
            raise UsageError(f"{path}: file {entry['file'][:200]!r}, expected a name without folders; {REBUILD}")
        _check_file(store, entry)
    return manifest


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries (file, bytes, sha256) of all files of a store."""
    others = [manifest[name] for name in ("captions_file", "tokens_file") if name in manifest]
    return [*manifest["shards"], *others]


def _check_fields(values: Any, fields: dict[str, type], where: str) -> None:
    for name, kind in fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            raise UsageError(f"{where}: '{name}' is {str(value)[:60]!r}, expected {kind.__name__}; {REBUILD}")


def _check_file(store: Path, entry: dict[str, Any]) -> None:
    path = store / entry["file"]
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: missing, but listed in {MANIFEST}; {REBUILD}") from None
    except OSError as error:
        raise UsageError(_not_read(path, error)) from error

    if not stat.S_ISREG(facts.st_mode):
        raise UsageError(f"{path}: no regular file, but listed in {MANIFEST}; {REBUILD}")
    size = facts.st_size
    if size != entry["bytes"]:
        raise UsageError(f"{path}: {size} bytes, expected {entry['bytes']} (truncated?); {REBUILD}")


def _not_read(path: Path, error: OSError) -> str:
    return f"{path}: could not be read ({error.strerror}), which says nothing against the file; mend that and try again"
