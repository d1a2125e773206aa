"""Write, read and verify a checkpoint's manifest: sizes and hashes of all files, and its own hash.

A folder without a valid manifest does not count as a checkpoint: the manifest is written last.
"""

import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from megatron_interbert import __version__
from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.files import encoded, file_sha256, is_plain_name, write_json
from megatron_interbert.reading import is_there, list_folder, read_regular, reading

MANIFEST = "manifest.json"
FORMAT = 2
STEP_FOLDER = "global_step"
BEST = "best"  # in a run's folder: a link to the best checkpoint
VOCABULARY = "vocab.txt"


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the hash of its own content added."""
    return {**manifest, "manifest_sha256": _digest(manifest)}


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(encoded(text)).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Seal and write a manifest, as the last file of a checkpoint."""
    write_json(folder / MANIFEST, seal({"format": FORMAT, **manifest}))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint folder.

    Raises UsageError if it is missing, damaged or of another format, and its subclass Unreadable if
    it cannot be read and so may be intact.
    """
    file = path / MANIFEST

    try:
        with reading(file):
            text = read_regular(file).decode()
        manifest = json.loads(text)
    except Unreadable:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no readable {MANIFEST} ({error})") from error

    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(key), dict) for key in ("files", "topology")
    ):
        raise UsageError(
            f"{file}: not the manifest of a checkpoint (a region store has one of its own)"
        )

    if manifest.get("format") != FORMAT:
        raise UsageError(
            f"{file}: checkpoint format {manifest.get('format')}, this version reads {FORMAT}"
        )

    if manifest.get("manifest_sha256") != _digest(manifest):
        raise UsageError(f"{MANIFEST} is not as it was written (its own sha256 differs)")
    for name in manifest["files"]:
        if not is_plain_name(name):
            raise UsageError(
                f"{file}: file {name[:200]!r}, expected a name without folders; restore the"
                " checkpoint"
            )

    return manifest


def verify(path: Path, rank: int = 0, ranks: int = 1, only: str = "") -> str | None:
    """Return what is wrong with a checkpoint's files; None if they match the manifest.

    Each of several ranks hashes its share. `only` limits the check to files with that prefix.
    Raises Unreadable if a file exists but cannot be read: it may be intact.
    """
    problem = wrong_size(path, only)  # sizes are cheap: every rank checks all
    if problem:
        return problem

    files = read_manifest(path)["files"]
    for name in sorted(name for name in files if name.startswith(only))[rank::ranks]:
        try:
            with reading(path / name):
                digest = file_sha256(path / name)
        except OSError:  # what `reading` lets through
            return f"{name} is missing"

        if digest != files[name]["sha256"]:
            return f"{name} has another sha256"

    return None


def wrong_size(path: Path, only: str = "") -> str | None:
    """Return what is wrong with a checkpoint's manifest and file sizes; None if they agree."""
    try:
        files = read_manifest(path)["files"]
    except Unreadable:
        raise
    except UsageError as error:
        return str(error)

    if not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()
    ):
        return f"{MANIFEST} lists files without their sizes and hashes"

    for name in sorted(name for name in files if name.startswith(only)):
        try:
            with reading(path / name):
                size = os.stat(path / name).st_size
        except OSError:  # what `reading` lets through
            return f"{name} is missing"

        if size != files[name]["bytes"]:
            return f"{name} has {size} bytes, expected {files[name]['bytes']}"

    return None


def of_right_size(path: Path) -> bool:
    """Check whether a checkpoint's manifest and file sizes agree; False if they are unreadable."""
    try:
        return wrong_size(path) is None
    except UsageError:
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoint folders that have a manifest, newest first.

    Raises Unreadable if the run's folder or one of them cannot be read.
    """
    return [path for path in step_folders(folder) if is_there(path / MANIFEST)]


def step_folders(folder: Path) -> list[Path]:
    """List paths that have the name of a checkpoint, highest step first."""
    steps = (
        name.removeprefix(STEP_FOLDER)
        for name in list_folder(folder)
        if name.startswith(STEP_FOLDER)
    )
    numbers = sorted(
        (step for step in steps if re.fullmatch("[0-9]{1,18}", step)), key=int, reverse=True
    )

    return [folder / f"{STEP_FOLDER}{number}" for number in numbers]


def newest_checkpoint(path: str | Path) -> Path | None:
    """Return `path` if it is a checkpoint, else the newest checkpoint in it, a run's folder; None
    if there is none.
    """
    if (Path(path) / MANIFEST).is_file():
        return Path(path)
    return next(iter(complete_checkpoints(Path(path))), None)


def passed_over(run: Path, taken: Path) -> list[Path]:
    """List the run's checkpoint folders of later steps than the one taken, newest first."""
    steps = step_folders(run)
    return steps[: steps.index(taken)] if taken in steps else []


def versions() -> dict[str, str]:
    """Return the versions of the software that writes a file."""
    return {
        "megatron_interbert": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def weights_name(
    tensor: tuple[int, int], data: tuple[int, int] = (0, 1), kind: str = "weights"
) -> str:
    """Return the name of a rank's file, `weights-tp-00-of-02-dp-00-of-04.safetensors`, from its
    (rank, ranks) in both groups.
    """
    places = f"tp-{tensor[0]:02d}-of-{tensor[1]:02d}-dp-{data[0]:02d}-of-{data[1]:02d}"
    return f"{kind}-{places}.safetensors"
