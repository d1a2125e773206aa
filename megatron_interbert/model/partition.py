"""Define how each parameter is partitioned over tensor-parallel ranks.

The norm tags that DeepSpeed reads, converters, initialisation and tests all use this table. Fused
QKV is head-major, so a plain slice of its rows holds whole heads and needs no kind of its own.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

# kind -> dimension that is cut; None: every rank holds the whole parameter
DIMENSION = {"column": 0, "row": 1, "vocab": 0, "replicated": None}

TABLE = [
    (r".*\.attention\.qkv\.(weight|bias)", "column"),
    (r".*\.attention\.output\.weight", "row"),
    (r".*\.mlp\.up\.(weight|bias)", "column"),
    (r".*\.mlp\.down\.weight", "row"),
    (r".*\.(attention|mlp)_norm\.(linear_bias|weight|bias)", "replicated"),
    (r"text_embedding\.word\.weight", "vocab"),
    (r"msm_head\.bias", "vocab"),
    (r"text_embedding\.(position|token_type|norm)\..*", "replicated"),
    (r"image_embedding\..*", "replicated"),
    (r"(text|image)_pooler\..*", "replicated"),
    (r"(msm|mrm)_head\.transform\..*", "replicated"),
    (r"mrm_head\.decoder\..*", "replicated"),
    (r"(itm|choice|sentence)_head\..*", "replicated"),
    (r"official_extra\..*", "replicated"),  # foreign heads, carried along by conversions
]


def partition_kind(name: str) -> str:
    """Return column, row, vocab or replicated; raises KeyError for a parameter not in the table."""
    for pattern, kind in TABLE:
        if re.fullmatch(pattern, name):
            return kind

    raise KeyError(f"parameter {name} has no row in model/partition.py")


def partition_dimension(name: str) -> int | None:
    """Return the dimension that is cut over ranks; None for replicated parameters."""
    return DIMENSION[partition_kind(name)]


def shard(tensor: torch.Tensor, name: str, rank: int, ranks: int) -> torch.Tensor:
    """Return the slice of a full parameter that rank `rank` of `ranks` holds."""
    dimension = partition_dimension(name)
    return tensor if dimension is None else tensor.chunk(ranks, dimension)[rank]


def unshard(shards: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """Return the full parameter from the slices of all ranks, in rank order."""
    dimension = partition_dimension(name)
    return shards[0] if dimension is None else torch.cat(list(shards), dimension)


def full_shape(name: str, shape: Sequence[int], ranks: int) -> list[int]:
    """Return the shape of the full parameter from the shape of one slice."""
    dimension = partition_dimension(name)
    return [size * ranks if axis == dimension else size for axis, size in enumerate(shape)]


def mark_shards(model: nn.Module) -> None:
    """Set the tags by which DeepSpeed distinguishes shards from replicated parameters in norms."""
    for name, parameter in model.named_parameters():
        dimension = partition_dimension(name)
        if dimension is not None:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = dimension


def unshard_state(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the full state dict from those of all tensor-parallel ranks."""
    return {name: unshard([state[name] for state in states], name) for name in states[0]}
