"""Compare virtual ranks: they must call the same collectives in the same order, and together save
each element of each parameter once.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from megatron_interbert.training.fragments import Outline
from megatron_interbert.virtual.rank import Rehearsal
from megatron_interbert.virtual.tracking import Collective


def first_difference(rehearsals: Sequence[Rehearsal]) -> str:
    """Describe the first collective in which a rank differs from the first one; "" if none does.

    Operations, groups and types must be the same on all ranks; numbers of elements on those of one
    group: other data-parallel ranks have other tokens in their tensor-parallel collectives.
    """
    first = rehearsals[0]

    for other in rehearsals[1:]:
        same_tokens = other.data_rank == first.data_rank
        pairs = zip(first.collectives, other.collectives, strict=False)
        for number, (ours, theirs) in enumerate(pairs):
            if facts(ours, same_tokens) != facts(theirs, same_tokens):
                return (
                    f"collective {number}: rank {first.rank} calls {told(ours)}, rank"
                    f" {other.rank} {told(theirs)}"
                )

        counts = (len(first.collectives), len(other.collectives))
        if counts[0] != counts[1]:
            longer = max((first, other), key=lambda one: len(one.collectives))
            extra = longer.collectives[min(counts)]
            return (
                f"rank {first.rank} calls {counts[0]} collectives, rank {other.rank} {counts[1]};"
                f" the first that only rank {longer.rank} calls is {told(extra)}"
            )

    return ""


def facts(one: Collective, same_tokens: bool) -> tuple[object, ...]:
    """Return what must be the same of a collective on two ranks."""
    counted = same_tokens or one.group != "tensor"
    return one.operation, one.group, one.dtype, one.elements if counted else None


def told(one: Collective) -> str:
    """Return a collective in words."""
    return f"{one.operation} of {one.elements} {one.dtype} in its {one.group} group"


def missing_or_double(
    outlines: Mapping[tuple[int, int], Sequence[Outline]], shapes: Mapping[str, Sequence[int]]
) -> str:
    """Describe an element that no rank saves or that two do; "" if each is saved once.

    `outlines` are what the ranks save, by (tensor rank, data rank), and `shapes` those of a
    tensor-parallel slice.
    """
    runs: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for (tensor_rank, _), outline in outlines.items():
        for piece in outline:
            runs[tensor_rank, piece.name].append((piece.start, piece.start + piece.length))

    for tensor_rank in sorted({place[0] for place in outlines}):
        for name, shape in shapes.items():
            whole = math.prod(shape)
            found = sorted(runs[tensor_rank, name])
            borders = [(0, 0), *found, (whole, whole)]
            for (_, end), (start, _) in pairwise(borders):
                if end != start:
                    what = "by no rank" if start > end else "twice"
                    return (
                        f"{name} of tensor rank {tensor_rank}: element {min(start, end)} is saved"
                        f" {what}"
                    )

    return ""
