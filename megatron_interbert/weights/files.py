"""Files that are whole or absent: safetensors written tensor by tensor with their hash, texts written beside and renamed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_interbert.errors import UsageError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 16 << 20  # bytes handed to the disk and the hash at a time; both let other threads run meanwhile


@dataclass(frozen=True)
class TensorLayout:
    """Type and shape of a tensor that is not in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path,
    layout: Mapping[str, TensorLayout],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Write a safetensors file from tensors that come in the order of `layout`, flush it, give {bytes, sha256}.

    The safetensors library wants all tensors at once and keeps Python's lock while it writes; here one tensor is in memory at
    a time and other threads run. ValueError when a tensor is not as announced, OSError when the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in layout.items():
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + entry.bytes]}
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as handle:

        def put(data: bytes | memoryview) -> None:
            for start in range(0, len(data), CHUNK):
                part = memoryview(data)[start : start + CHUNK]
                digest.update(part)
                while len(part):
                    part = part[handle.write(part) :]

        put(len(text).to_bytes(8, "little") + text)
        for (name, entry), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} given, announced {entry.dtype} {list(entry.shape)}")
            put(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
            progress(entry.bytes)
        os.fsync(handle.fileno())
        size = handle.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}


class TensorFile:
    """A safetensors file opened for reading tensor by tensor; the data stays on disk until it is used."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(str(path), framework="pt")
            self.names: list[str] = list(self._file.keys())
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from error

    def layout(self, name: str) -> TensorLayout:
        """Type and shape of a tensor, from the header."""
        part = self._file.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise UsageError(f"{self.path}: {name} is of type {part.get_dtype()}, expected one of {', '.join(DTYPES)}")
        return TensorLayout(DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._file.get_tensor(name)


def flush_file(path: Path) -> None:
    """Until a file's content is on disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def file_entry(path: Path) -> dict[str, Any]:
    """{bytes, sha256} of a file that is already there, flushed to disk."""
    flush_file(path)
    with open(path, "rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Write beside, flush, rename."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written beside and renamed."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def check_writable(folder: Path, flag: str) -> None:
    """UsageError where files cannot be written to a folder, or to the nearest one above it that is there. Leaves nothing behind."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_folder(folder), prefix=".writable-"):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {folder}: nothing can be written there ({error.strerror}); choose another folder") from None


def nearest_folder(folder: Path) -> Path:
    """The folder, or the one above it in which it would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
