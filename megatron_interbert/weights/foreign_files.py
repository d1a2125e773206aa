"""Open foreign files of tensors: safetensors, Hugging Face folders, state dicts saved by torch.

Nothing here runs code from a file: it uses safetensors, JSON, and `torch.load(weights_only=True)`.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.files import is_plain_name
from megatron_interbert.reading import is_there, list_folder, read_json, reading
from megatron_interbert.weights.manifest import MANIFEST
from megatron_interbert.weights.tensor_files import TensorFile, TensorLayout

HF_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
INDEX_ENDING = ".index.json"
HF_FILES = (HF_FILE, HF_FILE + INDEX_ENDING, TORCH_FILE, TORCH_FILE + INDEX_ENDING)
READABLE = (".safetensors", ".bin", ".pt", ".pth")
TF_CHECKPOINT = re.compile(r"(.+\.ckpt.*)\.(?:index|meta|data-\d+-of-\d+)")
TF_CONVERTER = "transformers.models.bert.convert_bert_original_tf_checkpoint_to_pytorch"
# name in a Hugging Face folder -> program, and flag of transformers 4 that reads it
OTHER_FILES = {
    "tf_model.h5": ("TensorFlow", "from_tf"),
    "flax_model.msgpack": ("Flax", "from_flax"),
}
# keys under which training programs keep a state dict beside their own state
WRAPPING = ("model", "state_dict", "module", "model_state_dict")
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

    def read(self, name: str, start: int, length: int) -> torch.Tensor:
        """Read elements [start, start + length) of one flattened tensor: [length]."""
        file = self.files[name]
        if isinstance(file, TensorFile):
            return file.read(name, start, length)
        return file[name].reshape(-1)[start : start + length]


def tensor_names(tensors: Tensors) -> list[str]:
    """List tensor names in the files' order."""
    return list(tensors.files)


def open_tensors(path: Path) -> Tensors:
    """Open a .safetensors or torch file, or the model file(s) of a Hugging Face folder.

    Pickled code never runs.
    """
    if path.is_dir():
        path = weights_file(path)
    if not path.name.endswith(INDEX_ENDING):
        file = open_file(path)
        return Tensors(dict.fromkeys(names_in(file), file))

    parts = read_index(path)
    opened = {file: open_file(path.parent / file) for file in sorted(set(parts.values()))}
    inside = {file: set(names_in(content)) for file, content in opened.items()}

    for name, file in parts.items():
        if name not in inside[file]:
            raise UsageError(f"{path}: {name[:200]} is not in {file}; restore the folder")

    return Tensors({name: opened[file] for name, file in parts.items()})


def weights_file(folder: Path) -> Path:
    """Return the file of weights, or the index of several, that transformers would take from a
    Hugging Face folder.
    """
    found = next((folder / name for name in HF_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(
            f"{folder}: no checkpoint there; expected {MANIFEST}, {HF_FILE} or {TORCH_FILE} in"
            " the folder"
        )

    return found


def open_file(path: Path) -> "TensorFile | dict[str, torch.Tensor]":
    """Open one .safetensors or torch file."""
    return TensorFile(path) if path.suffix == ".safetensors" else load_torch_file(path)


def names_in(file: "TensorFile | Mapping[str, torch.Tensor]") -> list[str]:
    """List the names of a file's tensors, in its order."""
    return file.names if isinstance(file, TensorFile) else list(file)


def check_path(path: Path) -> None:
    """Raise UsageError if a path does not exist, or has weights for TensorFlow or Flax alone."""
    files = list_folder(path) if path.is_dir() else [path.name]
    if not is_there(path):
        files = [f"{path.name}.index"]  # TensorFlow names a checkpoint by what its files share
        if not is_there(path.with_name(files[0])):
            raise UsageError(f"{path}: no such file or folder")

    if any(name.endswith(READABLE) for name in files):
        return

    folder = path if path.is_dir() else path.parent
    for name in files:
        if found := TF_CHECKPOINT.fullmatch(name):
            raise UsageError(
                f"{path}: a TensorFlow checkpoint; make a torch file of it with transformers 4 and"
                f" tensorflow: python -m {TF_CONVERTER} --tf_checkpoint_path {folder / found[1]}"
                f" --bert_config_file {folder / 'bert_config.json'}"
                f" --pytorch_dump_path {TORCH_FILE}"
            )
        if name in OTHER_FILES:
            program, flag = OTHER_FILES[name]
            raise UsageError(
                f"{path}: {name} holds weights for {program}, expected {HF_FILE} or {TORCH_FILE};"
                f" with transformers 4: BertModel.from_pretrained('{folder}',"
                f" {flag}=True).save_pretrained('torch')"
            )


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

    for _ in WRAPPING:
        if isinstance(state, dict) and not is_state_dict(state):
            inner = (state[key] for key in WRAPPING if isinstance(state.get(key), dict))
            state = next(inner, state)
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
