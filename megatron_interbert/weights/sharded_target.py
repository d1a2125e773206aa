"""Write weights as a checkpoint without an optimizer, with a file for each tensor-parallel rank."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_interbert.files import file_entry, write_bytes
from megatron_interbert.model.partition import is_expert, partition_dimension, shard
from megatron_interbert.weights.manifest import VOCABULARY, versions, weights_name, write_manifest
from megatron_interbert.weights.output import Output, Progress
from megatron_interbert.weights.reader import describe_pieces
from megatron_interbert.weights.tensor_files import write_tensors


def write_sharded(output: Output, work: Path, progress: Progress) -> None:
    """Write one safetensors file per tensor-parallel rank and a manifest: a checkpoint without an
    optimizer.
    """
    source = output.source
    ranks = output.tensor_parallel
    files = {}

    for rank in range(ranks):
        layout = {}
        pieces = {}

        for name, entry in source.layouts.items():
            if is_expert(name):
                start, length = share_of_experts(entry.shape, rank, ranks)
                layout[name] = output.layout(name, (length,))
                pieces[name] = (start, entry.shape)
                continue

            cut = partition_dimension(name)
            shape = [n // ranks if axis == cut else n for axis, n in enumerate(entry.shape)]
            layout[name] = output.layout(name, shape)
            pieces[name] = (0, layout[name].shape)

        tensors = (slice_of(output, name, rank, ranks) for name in layout)
        file = weights_name((rank, ranks))
        files[file] = write_tensors(work / file, layout, tensors, describe_pieces(pieces), progress)

    if output.vocabulary:
        write_bytes(work / VOCABULARY, output.vocabulary)
        files[VOCABULARY] = file_entry(work / VOCABULARY)

    data = {
        key: source.facts[key]
        for key in ("detector", "vocabulary", "store", "manifest_sha256", "task_heads")
        if key in source.facts
    }

    write_manifest(
        work,
        {
            "kind": "weights",
            "iteration": source.facts.get("iteration"),
            "consumed_samples": source.facts.get("consumed_samples"),
            "topology": {"data_parallel": 1, "tensor_parallel": ranks, "zero_stage": 0},
            "versions": versions(),
            "configs": {"model": dataclasses.asdict(source.config)},
            "data": data,
            "parameters": {name: list(entry.shape) for name, entry in source.layouts.items()},
            "files": files,
        },
    )


def share_of_experts(shape: Sequence[int], rank: int, ranks: int) -> tuple[int, int]:
    """Return (start, length) of the part of a flattened parameter of experts in a rank's file."""
    start, end = (math.prod(shape) * number // ranks for number in (rank, rank + 1))
    return start, end - start


def slice_of(output: Output, name: str, rank: int, ranks: int) -> torch.Tensor:
    """Return the part of a parameter in the file of one of `ranks` tensor-parallel ranks."""
    if is_expert(name):
        return output.part(name, *share_of_experts(output.layout(name).shape, rank, ranks))
    return shard(output.get(name), name, rank, ranks)
