"""Define how each parameter is partitioned over ranks: experts over those of the expert-parallel
group, all others over those of the tensor-parallel group.

The norm tags that DeepSpeed reads, converters, initialisation and tests all use this table. Fused
QKV is head-major, so a plain slice of its rows holds whole heads and needs no kind of its own.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_interbert.parallel.state import EXPERT_TAGS, ParallelState

TAGS = ("tensor_model_parallel", "partition_dim", *EXPERT_TAGS)
# kind -> dimension that is cut; None: every rank holds the whole parameter
DIMENSION = {"column": 0, "row": 1, "vocab": 0, "expert": 0, "replicated": None}

TABLE = [
    (r".*\.attention\.qkv\.(weight|bias)", "column"),
    (r".*\.attention\.output\.weight", "row"),
    (r".*\.mlp\.up\.(weight|bias)", "column"),
    (r".*\.mlp\.down\.weight", "row"),
    (r".*\.mlp\.experts\.(up|down)\.(weight|bias)", "expert"),
    (r".*\.mlp\.router\.weight", "replicated"),
    (r".*\.(attention|mlp)_norm\.(linear_bias|weight|bias)", "replicated"),
    (r"text_embedding\.word\.weight", "vocab"),
    (r"msm_head\.bias", "vocab"),
    (r"text_embedding\.(position|token_type|norm)\..*", "replicated"),
    (r"image_embedding\..*", "replicated"),
    (r"(text|image)_pooler\..*", "replicated"),
    (r"(msm|mrm|mrfr|attribute)_head\.transform\..*", "replicated"),
    (r"mrfr_head\.bias", "replicated"),
    (r"(mrm|attribute)_head\.decoder\..*", "replicated"),
    (r"(itm|choice|sentence)_head\..*", "replicated"),
    (r"task_heads\..*", "replicated"),
    (r"official_extra\..*", "replicated"),  # foreign heads, carried along by conversions
]


def partition_kind(name: str) -> str:
    """Return column, row, vocab, expert or replicated; raises KeyError for a parameter that is not
    in the table.
    """
    for pattern, kind in TABLE:
        if re.fullmatch(pattern, name):
            return kind

    raise KeyError(f"parameter {name} has no row in model/partition.py")


def is_expert(name: str) -> bool:
    """Check whether a parameter belongs to experts, which expert-parallel ranks divide."""
    return partition_kind(name) == "expert"


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Check whether a parameter is a matrix, or one for each expert, and no bias: to these weight
    decay applies.
    """
    return len(shape) > 1 and not name.endswith("bias")


def place_of(name: str, state: ParallelState) -> tuple[int, int]:
    """Return (rank, ranks) of this process in the group over which a parameter is partitioned."""
    if is_expert(name):
        return state.expert_rank, state.expert_size
    return state.tensor_rank, state.tensor_size


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
    whole = dimension is None or len(shards) == 1
    return shards[0] if whole else torch.cat(list(shards), dimension)


def full_shape(name: str, shape: Sequence[int], ranks: int) -> list[int]:
    """Return the shape of the full parameter from the shape of one slice."""
    dimension = partition_dimension(name)
    return [size * ranks if axis == dimension else size for axis, size in enumerate(shape)]


@dataclass(frozen=True)
class Runs:
    """Locate `count` runs of `length` elements each in a flattened parameter; the first begins at
    `start`, each next one `stride` elements later.
    """

    start: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """Return the index after the last element."""
        return self.start + (self.count - 1) * self.stride + self.length

    def within(self, covering: torch.Tensor) -> torch.Tensor:
        """Return the runs, one after another, of a contiguous flat tensor that begins at `start`
        and ends at `end`.
        """
        if self.count == 1:
            return covering
        return covering.as_strided((self.count, self.length), (self.stride, 1)).reshape(-1)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join flat tensors, without a copy if there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts)) if parts else torch.empty(0)


def in_slices(
    name: str, full: Sequence[int], ranks: int, start: int, length: int
) -> list[tuple[int, int, int]]:
    """Locate elements [start, start + length) of a flattened whole parameter of shape `full` in the
    flattened slices of `ranks` ranks: (rank, start in its slice, length) of each part, in order.
    """
    cut = partition_dimension(name)
    if cut is None or ranks == 1:
        return [(0, start, length)]

    columns = full[1] if cut == 1 else math.prod(full)  # elements between two equal places
    width = columns // ranks
    found = []

    while length > 0:
        row, column = divmod(start, columns)
        rank, within = divmod(column, width)
        part = min(width - within, length)
        found.append((rank, row * width + within, part))
        start += part
        length -= part

    return found


@dataclass(frozen=True)
class SliceRun:
    """Locate elements [start, start + length) of the flattened slice, of `shape`, that rank `rank`
    of `ranks` holds of a parameter.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    ranks: int
    start: int
    length: int

    @property
    def full_shape(self) -> list[int]:
        """Return the shape of the whole parameter."""
        return full_shape(self.name, self.shape, self.ranks)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the run's elements of a flat tensor that holds the whole parameter."""
        return joined([runs.within(flat[runs.start : runs.end]) for runs in self.in_full()])

    def gather(self, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Return the run's elements by `read(start, length)`, which returns contiguous elements of
        the flattened whole parameter.
        """
        return joined(
            [
                read(runs.start + number * runs.stride, runs.length)
                for runs in self.in_full()
                for number in range(runs.count)
            ]
        )

    def split(self, most: int) -> "list[SliceRun]":
        """Split the run into runs of at most `most` elements."""
        return [
            SliceRun(
                self.name,
                self.shape,
                self.rank,
                self.ranks,
                self.start + first,
                min(most, self.length - first),
            )
            for first in range(0, self.length, most)
        ]

    def in_full(self) -> list[Runs]:
        """Locate the run's elements, in order, in the flattened whole parameter."""
        cut = partition_dimension(self.name)
        if cut is None or self.ranks == 1:
            return [Runs(self.start, self.length)]
        if cut == 0:
            return [Runs(self.rank * math.prod(self.shape) + self.start, self.length)]

        return self._in_columns()

    def _in_columns(self) -> list[Runs]:
        """Locate the run of a matrix whose columns are cut: part of a row, whole rows, part of a
        row.
        """
        columns = self.shape[1]
        stride = columns * self.ranks
        position = self.start
        end = self.start + self.length
        found = []

        while position < end:
            row, column = divmod(position, columns)
            whole_rows = (end - position) // columns if not column else 0
            length = columns if whole_rows else min(columns - column, end - position)
            first = row * stride + self.rank * columns + column
            found.append(Runs(first, length, max(whole_rows, 1), stride))
            position += length * max(whole_rows, 1)

        return found


def mark_shards(model: nn.Module) -> None:
    """Set the tags by which DeepSpeed distinguishes shards from replicated parameters in norms;
    those of experts are set when they are made.
    """
    for name, parameter in model.named_parameters():
        dimension = partition_dimension(name)
        if dimension is not None and not is_expert(name):
            parameter.tensor_model_parallel = True
            parameter.partition_dim = dimension


def copy_tags(source: nn.Parameter, target: nn.Parameter) -> None:
    """Copy the tags of a parameter for DeepSpeed to the one that takes its place."""
    for tag in TAGS:
        if hasattr(source, tag):
            setattr(target, tag, getattr(source, tag))


def unshard_state(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the full state dict from those of all tensor-parallel ranks."""
    return {name: unshard([state[name] for state in states], name) for name in states[0]}
