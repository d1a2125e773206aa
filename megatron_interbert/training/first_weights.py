"""First weights from elsewhere (`--init-from`): recognises what kind of checkpoint a path holds and loads it."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_interbert.config import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.foreign import from_bert, from_official
from megatron_interbert.model.initialise import load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from megatron_interbert.training.checkpoint import check_same_model, complete_checkpoints, load_weights


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .bin file, or of the model file in a Hugging Face folder. Never runs pickled code."""
    file = Path(path)
    if file.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        file = next((file / name for name in names if (file / name).is_file()), None)
        if file is None:
            raise UsageError(f"--init-from {path}: none of {', '.join(names)} in the folder")
    if not file.is_file():
        raise UsageError(f"--init-from {path}: no such file or folder")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds for a damaged file
        raise UsageError(f"--init-from {file}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def load_initial_weights(model: InterBert, config: ModelConfig, path: str, state: ParallelState, vocabulary: str = "") -> set[str]:
    """Load --init-from into a model; the names of parameters that came from BERT (they may train at a lower rate).

    `vocabulary` is the sha256 of the run's vocabulary, which one of our checkpoints must share.
    """
    if (Path(path) / CHECKPOINT_MANIFEST).is_file() or complete_checkpoints(Path(path)):
        full, _, manifest = load_weights(path)
        check_same_model(manifest, config, vocabulary, path)
        load_full_state(model, full, state, path)
        return set()
    source = read_state_dict(path)
    if any("v_embeddings" in name for name in source):
        load_full_state(model, from_official(source, config, path), state, path)
        return set()
    if any(name.endswith("embeddings.word_embeddings.weight") for name in source):
        return load_full_state(model, from_bert(source, config, path), state, path, partial=True)
    raise UsageError(
        f"--init-from {path}: neither BERT in Hugging Face form, nor an official InterBERT state dict, nor one"
        " of our checkpoint folders"
    )
