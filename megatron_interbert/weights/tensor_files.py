"""Write and read safetensors files tensor by tensor."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import reading

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
# bytes written and hashed at a time; both release the GIL
CHUNK = 16 << 20
MOST_READ = 1 << 30  # bytes asked for in one read; Linux gives at most 2 GiB


@dataclass(frozen=True)
class TensorLayout:
    """Hold the dtype and shape of a tensor that is not in memory."""

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
    """Write and flush a safetensors file from tensors in the order of `layout`; return
    {bytes, sha256}.

    Raises ValueError if a tensor does not match its layout, OSError if the disk is full.
    """
    with TensorWriter(path, layout, metadata) as writer:
        for (name, entry), tensor in zip(layout.items(), tensors, strict=True):
            writer.write(name, tensor)
            progress(entry.bytes)

        return writer.finish()


class TensorWriter:
    """Write a safetensors file tensor by tensor, in the order of its layout.

    The safetensors library needs all tensors at once and holds the GIL while it writes; here one
    tensor is in memory at a time and other threads run.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, TensorLayout],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._coming = iter(layout.items())
        self._digest = hashlib.sha256()
        self._handle = open(path, "wb", buffering=0)
        self._put(header_of(layout, metadata))

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; ValueError if it is not the one that the layout has next."""
        expected, entry = next(self._coming, ("no further tensor", None))
        if name != expected or tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} given, expected {expected}: {entry}"
            )

        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(memoryview(content.numpy()))

    def finish(self) -> dict[str, Any]:
        """Flush the file; return {bytes, sha256}. ValueError if tensors are missing."""
        if missing := next(self._coming, None):
            raise ValueError(f"{missing[0]}: not written")

        os.fsync(self._handle.fileno())

        return {"bytes": self._handle.tell(), "sha256": self._digest.hexdigest()}

    def _put(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            part = memoryview(data)[start : start + CHUNK]
            self._digest.update(part)
            while len(part):
                part = part[self._handle.write(part) :]


def header_of(layout: Mapping[str, TensorLayout], metadata: Mapping[str, str] | None) -> bytes:
    """Build a safetensors header: its length in 8 bytes, then JSON padded with spaces to a multiple
    of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0

    for name, entry in layout.items():
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """Read a safetensors file tensor by tensor; data stay on disk until used.

    Raises UsageError if the file is not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(str(path), framework="pt")
            self.names: list[str] = list(self._file.keys())
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self._begins = first_bytes(self.path)
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})"
            ) from error

    def layout(self, name: str) -> TensorLayout:
        """Return the dtype and shape of a tensor, from the header."""
        part = self._file.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise UsageError(
                f"{self.path}: {name} is of type {part.get_dtype()}, expected one of"
                f" {', '.join(DTYPES)}"
            )

        return TensorLayout(DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self._file.get_tensor(name)

    def read(self, name: str, start: int, length: int) -> torch.Tensor:
        """Read elements [start, start + length) of a flattened tensor: [length].

        Only they are read from the disk. Raises Unreadable if the disk fails, or the file ends
        before them.
        """
        dtype = self.layout(name).dtype
        found = torch.empty(length, dtype=dtype)
        buffer = memoryview(found.view(torch.uint8).numpy())
        position = self._begins[name] + start * dtype.itemsize

        with reading(self.path), open(self.path, "rb", buffering=0) as handle:
            while buffer:
                count = os.preadv(handle.fileno(), [buffer[:MOST_READ]], position)
                if not count:
                    raise OSError(errno.EIO, f"ends within {name}", str(self.path))
                buffer = buffer[count:]
                position += count

        return found


def first_bytes(path: Path) -> dict[str, int]:
    """Return where the data of each tensor begin in a safetensors file, from its header."""
    with open(path, "rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))

    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def is_finite(tensor: torch.Tensor) -> bool:
    """Check whether a tensor has neither NaN nor infinity, without allocating another of its size
    (except for 8-bit floats).
    """
    # torch has no aminmax for 8-bit floats
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()

    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())
