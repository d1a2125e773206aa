"""The manifest that makes a folder of weights a checkpoint: sizes and hashes of all files, and a hash of itself.

A folder without a valid manifest does not exist: the manifest is written after everything else.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from megatron_interbert import __version__
from megatron_interbert.data.manifest import file_sha256, is_plain_name
from megatron_interbert.errors import UsageError
from megatron_interbert.weights.files import write_json

MANIFEST = "manifest.json"
FORMAT = 2
STEP_FOLDER = "global_step"
BEST = "best"  # in a run's folder: a link to the checkpoint with the best figure
VOCABULARY = "vocab.txt"


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of its own content."""
    return {**manifest, "manifest_sha256": _digest(manifest)}


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Seal and write; the last file of a checkpoint."""
    write_json(folder / MANIFEST, seal({"format": FORMAT, **manifest}))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; UsageError when it is missing, damaged or of another format."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: no readable {MANIFEST} ({error})") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in ("files", "topology")):
        raise UsageError(f"{file}: not the manifest of a checkpoint (a region store has one of its own)")
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{file}: checkpoint format {manifest.get('format')}, this version reads {FORMAT}")
    if manifest.get("manifest_sha256") != _digest(manifest):
        raise UsageError(f"{MANIFEST} is not as it was written (its own sha256 differs)")
    for name in manifest["files"]:
        if not is_plain_name(name):
            raise UsageError(f"{file}: file {name[:200]!r}, expected a name without folders; restore the checkpoint")
    return manifest


def verify(path: Path, rank: int = 0, ranks: int = 1, only: str = "") -> str | None:
    """None when the files are as the manifest says, else what is wrong. Of several ranks each checks its share.

    `only` limits the check to files whose names begin so.
    """
    try:
        files = read_manifest(path)["files"]
    except UsageError as error:
        return str(error)
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()):
        return f"{MANIFEST} lists files without their sizes and hashes"
    names = sorted(name for name in files if name.startswith(only))
    for name in names:  # sizes are cheap: every rank looks at all
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != files[name]["bytes"]:
            return f"{name} has {size} bytes, expected {files[name]['bytes']}"
    for name in names[rank::ranks]:
        try:
            if file_sha256(path / name) != files[name]["sha256"]:
                return f"{name} has another sha256"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run that have a manifest, newest first."""
    start = len(STEP_FOLDER)
    found = [p for p in folder.glob(f"{STEP_FOLDER}*") if (p / MANIFEST).is_file() and p.name[start:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[start:]), reverse=True)


def newest_checkpoint(path: str | Path) -> Path | None:
    """A checkpoint folder itself, or the newest one in a run's folder; None when there is none."""
    if (Path(path) / MANIFEST).is_file():
        return Path(path)
    return next(iter(complete_checkpoints(Path(path))), None)


def versions() -> dict[str, str]:
    """What wrote a file."""
    return {"megatron_interbert": __version__, "torch": torch.__version__, "python": platform.python_version()}


def weights_name(tensor: tuple[int, int], data: tuple[int, int] = (0, 1), kind: str = "weights") -> str:
    """File of one rank: `weights-tp-00-of-02-dp-00-of-04.safetensors` from (rank, ranks) of both groups."""
    return f"{kind}-tp-{tensor[0]:02d}-of-{tensor[1]:02d}-dp-{data[0]:02d}-of-{data[1]:02d}.safetensors"
