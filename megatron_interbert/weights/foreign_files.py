"""Open foreign files of tensors: safetensors, Hugging Face folders, state dicts saved by torch.

Nothing here runs code from a file: it uses safetensors, JSON, and `torch.load(weights_only=True)`.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.files import is_plain_name
from megatron_interbert.reading import read_json, reading
from megatron_interbert.weights.manifest import MANIFEST
from megatron_interbert.weights.tensor_files import TensorFile, TensorLayout

HF_FILE = "model.safetensors"
HF_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
# a zip archive; a pickle, before torch 1.6
TORCH_BEGINS = (b"PK\3\4", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


class Tensors:
    """Read tensors of a safetensors file, of several with an index, or of a torch file (mapped from
    disk if possible).
    """

    def __init__(self, files: Mapping[str, "TensorFile | Mapping[str, torch.Tensor]"]) -> None:
        self.files = files  # tensor name -> where it is

    def layout(self, name: str) -> TensorLayout:
        """Return the dtype and shape of a tensor."""
        file = self.files[name]
        return (
            file.layout(name)
            if isinstance(file, TensorFile)
            else TensorLayout(file[name].dtype, tuple(file[name].shape))
        )

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        file = self.files[name]
        return file.get(name) if isinstance(file, TensorFile) else file[name]


def tensor_names(tensors: Tensors) -> list[str]:
    """List tensor names in the files' order."""
    return list(tensors.files)


def open_tensors(path: Path) -> Tensors:
    """Open a .safetensors or torch file, or the model file(s) of a Hugging Face folder.

    Pickled code never runs.
    """
    if path.is_dir():
        if (path / HF_INDEX).is_file():
            parts = read_index(path / HF_INDEX)
            opened = {file: TensorFile(path / file) for file in set(parts.values())}

            for name, file in parts.items():
                if name not in opened[file].names:
                    raise UsageError(
                        f"{path / HF_INDEX}: {name[:200]} is not in {file}; restore the folder"
                    )

            return Tensors({name: opened[file] for name, file in parts.items()})

        found = next(
            (path / name for name in (HF_FILE, TORCH_FILE) if (path / name).is_file()), None
        )
        if found is None:
            raise UsageError(
                f"{path}: no checkpoint there; expected {MANIFEST}, {HF_FILE} or {TORCH_FILE} in"
                " the folder"
            )

        path = found

    if path.suffix == ".safetensors":
        file = TensorFile(path)
        return Tensors(dict.fromkeys(file.names, file))

    state = load_torch_file(path)

    return Tensors(dict.fromkeys(state, state))


def read_index(path: Path) -> dict[str, str]:
    """Read from an index which file, in the same folder, holds each tensor."""
    parts = read_json(path, str(path)).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise UsageError(
            f"{path}: weight_map is {parts!r:.60}, expected a mapping from tensor names to file"
            " names; restore the folder"
        )

    for name, file in parts.items():
        if not is_plain_name(file):
            raise UsageError(
                f"{path}: the file of {name[:200]} is {file!r:.200}, expected a name without"
                " folders; restore the folder"
            )

    return parts


def load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict saved by torch without running code; UsageError for anything else."""
    try:
        with reading(path), open(path, "rb") as handle:
            begins = handle.read(4)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error

    if not begins.startswith(TORCH_BEGINS):
        raise UsageError(
            f"{path}: not a file of weights; expected safetensors (NAME.safetensors), a state dict"
            " saved by torch, or the folder of a run, a checkpoint or a Hugging Face model"
        )

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written by torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path}: refused: the file holds more than tensors, and loading it would run code"
            f" ({_reason(error)}); ask for safetensors"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UsageError(
            f"{path}: cannot be read as a torch file ({type(error).__name__}: {_reason(error)})"
        ) from error

    if isinstance(state, dict):
        state = state.get("model", state.get("state_dict", state))
    if not is_state_dict(state):
        raise UsageError(f"{path}: not a state dict, expected a mapping from names to tensors")

    return state


def is_state_dict(value: Any) -> bool:
    """Check whether a value is a mapping, not empty, from names to tensors."""
    if not isinstance(value, dict) or not value:
        return False

    return all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return "no reason"

    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (telling or lines)[0][:160]
