"""Compare virtual ranks: none may wait for ever in a collective, and together they must save each
element of each parameter once.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_interbert.model.partition import is_expert
from megatron_interbert.training.fragments import Outline
from megatron_interbert.virtual.rank import Rehearsal
from megatron_interbert.virtual.tracking import Collective

UNEVEN = "alltoall"  # the collective in which ranks contribute different numbers of elements


def find_hang(rehearsals: Sequence[Rehearsal]) -> str:
    """Play the ranks' collectives against each other, and describe the first that cannot complete;
    "" if all do.

    A collective completes when every rehearsed rank of its group has come to it, with the same
    operation, type and number of elements; ranks that were not rehearsed count as agreeing.
    """
    members: dict[Group, list[Rehearsal]] = defaultdict(list)
    for one in rehearsals:
        for kind in ("tensor", "data", "secondary", "expert", "expert_data", "world"):
            members[group_of(one, kind)].append(one)

    done = {one.rank: 0 for one in rehearsals}
    waiting = list(members)  # groups that may be able to continue

    while waiting:
        group = waiting.pop()
        heads = {one.rank: head(one, done) for one in members[group]}
        if not all(found and found.group == group[0] for found in heads.values()):
            continue  # a member is in another group's collective, or has ended

        if difference := differing(heads):
            return difference
        for one in members[group]:
            done[one.rank] += 1
            if following := head(one, done):
                waiting.append(group_of(one, following.group))

    stuck = [one for one in rehearsals if head(one, done)]

    return told_stuck(stuck[0], members, done) if stuck else ""


Group = tuple[str, int]  # (kind, what its members have in common)


def group_of(one: Rehearsal, kind: str) -> Group:
    """Return the group of a kind that a rank is in."""
    common = {
        "tensor": one.data_rank,
        "data": one.tensor_rank,
        "secondary": one.secondary_group,
        "expert": one.expert_data_rank,
        "expert_data": one.expert_rank,
    }

    return kind, common.get(kind, 0)


def head(one: Rehearsal, done: Mapping[int, int]) -> Collective | None:
    """Return the collective that a rank is in, after those that are `done`; None at its end."""
    number = done[one.rank]
    return one.collectives[number] if number < len(one.collectives) else None


def differing(heads: Mapping[int, Collective]) -> str:
    """Describe two ranks in one collective that do not agree on it; "" if all do."""
    first, ours = next(iter(heads.items()))
    for rank, theirs in heads.items():
        uneven = ours.operation == theirs.operation == UNEVEN  # ranks send what they have
        if theirs != (replace(ours, elements=theirs.elements) if uneven else ours):
            return f"rank {first} calls {told(ours)}, rank {rank} {told(theirs)}"

    return ""


def told_stuck(
    one: Rehearsal, members: Mapping[Group, Sequence[Rehearsal]], done: Mapping[int, int]
) -> str:
    """Describe why a rank waits for ever: a rank of the same group that is elsewhere."""
    wanted = head(one, done)
    text = f"rank {one.rank} waits in {told(wanted)} (collective {done[one.rank]} of its step)"

    for other in members[group_of(one, wanted.group)]:
        theirs = head(other, done)
        if theirs is None:
            return f"{text}, rank {other.rank} has ended its step"
        if theirs.group != wanted.group:
            return f"{text}, rank {other.rank} in {told(theirs)}"

    return text


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
    of_experts: dict[str, Sequence[int]] = {}

    for (tensor_rank, _), outline in outlines.items():
        for piece in outline:
            if is_expert(piece.name):  # files have all experts in one line
                of_experts[piece.name] = piece.shape
                tensor_rank = 0
            runs[tensor_rank, piece.name].append((piece.start, piece.start + piece.length))

    for tensor_rank in sorted({place[0] for place in outlines}):
        for name, shape in shapes.items():
            if is_expert(name) and tensor_rank:
                continue
            whole = math.prod(of_experts.get(name, shape))
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
