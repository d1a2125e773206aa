"""Read a checkpoint's tensors for any layout: join the ranks' pieces and reshard, one tensor at a
time.

A rank's file holds, for each parameter, one run of the flattened tensor-parallel slice; the file's
metadata gives its start and the slice's shape. Experts are not sliced: the run is one of all
experts, and every rank's file may hold some. That is all it takes to read them for another layout:
no conversion is needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig, model_config_from_dict
from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import SliceRun, in_slices, is_expert, joined, unshard
from megatron_interbert.weights.manifest import read_manifest, weights_name
from megatron_interbert.weights.tensor_files import TensorFile, TensorLayout

# kind of tensor -> file
KINDS = {"weight": "weights", "exp_avg": "optimizer", "exp_avg_sq": "optimizer", "ema": "ema"}
PIECES = "pieces"
ALL = None  # tensor-parallel ranks, in place of the number of one


def holds(manifest: Mapping[str, Any], kind: str) -> bool:
    """Check whether a checkpoint has tensors of a kind: averaged weights ("ema") exist only if the
    run kept them.
    """
    return any(name.startswith(f"{KINDS[kind]}-tp-") for name in manifest["files"])


def piece_key(name: str, kind: str) -> str:
    """Return a tensor's name in its file; both moments share the optimizer's file."""
    return name if kind in ("weight", "ema") else f"{name}.{kind}"


def describe_pieces(pieces: Mapping[str, tuple[int, tuple[int, ...]]]) -> dict[str, str]:
    """Build a file's metadata from name -> (first element, shape of the slice)."""
    return {
        PIECES: json.dumps({name: [start, list(shape)] for name, (start, shape) in pieces.items()}),
        "format": "pt",
    }


@dataclass
class Piece:
    """Locate a run of a flattened slice in a file."""

    file: TensorFile
    key: str
    start: int
    length: int


# key -> (shape of the slice, or of all experts; its pieces in order of start)
Index = dict[str, tuple[tuple[int, ...], list[Piece]]]


class CheckpointReader:
    """Read tensors of one checkpoint folder (from training, or exported weights).

    Files are opened when first needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self.tensor_size: int = self.manifest["topology"]["tensor_parallel"]
        self.data_size: int = self.manifest["topology"]["data_parallel"]
        self.shapes: dict[str, tuple[int, ...]] = {
            n: tuple(s) for n, s in self.manifest["parameters"].items()
        }
        self._index: dict[tuple[str, int | None], Index] = {}

    @cached_property
    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return model_config_from_dict(self.manifest["configs"]["model"], str(self.path))

    @property
    def names(self) -> list[str]:
        """Return the parameter names, in the model's order."""
        return list(self.shapes)

    def has(self, kind: str) -> bool:
        """Check whether the checkpoint holds tensors of a kind."""
        return holds(self.manifest, kind)

    def layout(self, name: str) -> TensorLayout:
        """Return the dtype and full shape of a parameter."""
        piece = self._pieces("weight", self._ranks_of(name)[0], name)[1][0]
        return TensorLayout(piece.file.layout(piece.key).dtype, self.shapes[name])

    def get(self, name: str, kind: str = "weight") -> torch.Tensor:
        """Return the full tensor, joined from all ranks."""
        return unshard([self._slice(name, kind, rank) for rank in self._ranks_of(name)], name)

    def read(self, kind: str, run: SliceRun) -> torch.Tensor:
        """Return a run of a rank's slice in any layout; only that run is read from the disk.

        An average ("ema") that the checkpoint lacks begins as the weights. Raises UsageError if the
        checkpoint's tensor does not have the shape of the run's.
        """
        name = run.name
        if kind == "ema" and not self.has(kind):
            kind = "weight"

        if list(self.shapes.get(name, ())) != run.full_shape or name not in self.shapes:
            raise UsageError(
                f"{self.path}: {name} is {list(self.shapes.get(name, ())) or 'missing'}, this model"
                f" has {run.full_shape}; give the --model it was made with"
            )

        if run.ranks == self.tensor_size and not is_expert(name):
            return self._run(name, kind, run.rank, run.start, run.length)

        return run.gather(lambda start, length: self.read_full(name, kind, start, length))

    def read_full(self, name: str, kind: str, start: int, length: int) -> torch.Tensor:
        """Return elements [start, start + length) of the flattened whole parameter."""
        if is_expert(name):
            return self._run(name, kind, ALL, start, length)

        parts = in_slices(name, self.shapes[name], self.tensor_size, start, length)
        return joined([self._run(name, kind, *part) for part in parts])

    def _ranks_of(self, name: str) -> Sequence[int | None]:
        """Return the tensor-parallel ranks whose slices make up a parameter."""
        return [ALL] if is_expert(name) else range(self.tensor_size)

    def _slice(self, name: str, kind: str, rank: int | None) -> torch.Tensor:
        shape = self._pieces(kind, rank, name)[0]
        return self._run(name, kind, rank, 0, torch.Size(shape).numel()).view(shape)

    def _run(self, name: str, kind: str, rank: int | None, start: int, length: int) -> torch.Tensor:
        """Return a run of a slice in the layout of the checkpoint; UsageError if part of it is
        missing.
        """
        parts = []
        reached = start

        for piece in self._pieces(kind, rank, name)[1]:
            first = max(start, piece.start)
            last = min(start + length, piece.start + piece.length)
            if first < last:
                if first != reached:
                    break
                parts.append(piece.file.read(piece.key, first - piece.start, last - first))
                reached = last

        if reached != start + length:
            raise UsageError(
                f"{self.path}: {piece_key(name, kind)} is incomplete in the files of {of(rank)}"
            )

        return joined(parts)

    def _pieces(
        self, kind: str, rank: int | None, name: str
    ) -> tuple[tuple[int, ...], list[Piece]]:
        pieces = self._indexed(KINDS[kind], rank).get(piece_key(name, kind))
        if pieces is None:
            raise UsageError(
                f"{self.path}: {piece_key(name, kind)} is not in the {KINDS[kind]} files of"
                f" {of(rank)}"
            )

        return pieces

    def _indexed(self, file_kind: str, rank: int | None) -> Index:
        """Return which pieces of each tensor a tensor-parallel rank's files, or those of all, hold;
        they are read once.
        """
        where = (file_kind, rank)
        if where not in self._index:
            everyone = range(self.tensor_size)
            parts = (
                [self._indexed(file_kind, one) for one in everyone]
                if rank is ALL
                else [self._read_index(file_kind, rank)]
            )
            self._index[where] = sorted_index(parts)

        return self._index[where]

    def _read_index(self, file_kind: str, rank: int) -> Index:
        """Read which pieces of each tensor a tensor-parallel rank's files hold."""
        index: Index = {}

        for data_rank in range(self.data_size):
            file = self.path / weights_name(
                (rank, self.tensor_size), (data_rank, self.data_size), file_kind
            )
            if not file.is_file():
                raise UsageError(f"{file}: missing; copy the whole checkpoint, or use another one")

            source = TensorFile(file)
            described = json.loads(source.metadata.get(PIECES, "{}"))

            for key in source.names:
                start, shape = described[key]
                length = torch.Size(source.layout(key).shape).numel()
                index.setdefault(key, (tuple(shape), []))[1].append(
                    Piece(source, key, start, length)
                )

        return index


def sorted_index(indexes: Sequence[Index]) -> Index:
    """Join indexes, with the pieces in order of start."""
    joined_index: Index = {}
    for index in indexes:
        for key, (shape, pieces) in index.items():
            joined_index.setdefault(key, (shape, []))[1].extend(pieces)

    for _, pieces in joined_index.values():
        pieces.sort(key=lambda piece: piece.start)

    return joined_index


def of(rank: int | None) -> str:
    """Return the words for a tensor-parallel rank, or all of them, in a message."""
    return "all ranks" if rank is ALL else f"tensor rank {rank}"
