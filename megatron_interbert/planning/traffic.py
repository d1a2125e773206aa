"""Predict what a rank contributes to each collective of an optimizer step, by arithmetic.

Tests compare it with the collectives of a dry run: equal bytes. What ZeRO-3 gathers a second time,
beyond its live limit or for another micro-batch, is an estimate: DeepSpeed keeps whole parameters,
and some of them between micro-batches.
"""

import math
from collections import Counter

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.flops import Tokens
from megatron_interbert.planning.layout import (
    FP32,
    Division,
    Layout,
    Load,
    parameters_of,
    targets_of,
    update_groups,
)

FLOAT64 = 8
INT64 = 8
LOSSES = 3
VECTORS = 3  # replicated parameters of a norm, whose gradients are summed where rows are split

# (operation, group) -> bytes; operations are all_reduce, all_gather, reduce_scatter and alltoall;
# groups are tensor, data, secondary, expert and expert_data
Traffic = Counter[tuple[str, str]]


def expected_tokens(load: Load) -> Tokens:
    """Estimate the tokens of a micro-batch by its means."""
    words, regions = targets_of(load)
    count = load.samples
    image = load.regions + 1

    return Tokens(
        count * load.words,
        count * image,
        count,
        count,
        count * words,
        count * regions,
        count * load.words**2,
        count * image**2,
        count * (load.words + image) ** 2,
    )


def step_traffic(sizes: ModelConfig, layout: Layout, micro_batches: list[Tokens]) -> Traffic:
    """Return the bytes that a rank contributes to each kind of collective in a step."""
    found: Traffic = Counter()
    if layout.tensor > 1:
        for tokens in micro_batches:
            found += tensor_traffic(sizes, layout, tokens)
        by_us = layout.zero_stage < 3 or layout.shares_nothing
        found["all_reduce", "tensor"] += (3 if by_us else 2) * FLOAT64  # the norm

    if layout.expert > 1:
        for tokens in micro_batches:
            found += expert_traffic(sizes, layout, tokens)
    found += data_traffic(sizes, layout, len(micro_batches))

    return found


def expert_traffic(sizes: ModelConfig, layout: Layout, tokens: Tokens) -> Traffic:
    """Return the bytes in the expert-parallel group of one micro-batch: rows to their experts and
    back, forward (again in recomputation) and backward, if all experts have the same load.
    """
    hidden = sizes.hidden_size * layout.element
    passes = 3 if layout.recompute else 2
    found: Traffic = Counter()

    for stack, (layers, count, _, read) in zip(sizes.STACKS, tokens.stacks(sizes), strict=True):
        if not sizes.has_experts(stack) or not layers:
            continue
        rows = count * layers if read is None else count * (layers - 1) + read
        found["alltoall", "expert"] += 2 * passes * sizes.prototypes * hidden * rows / layout.tensor
        found["alltoall", "expert"] += (passes - 1) * layers * INT64 * sizes.experts  # counts

    return found


def tensor_traffic(sizes: ModelConfig, layout: Layout, tokens: Tokens) -> Traffic:
    """Return the bytes in the tensor-parallel group of one micro-batch, forward and backward."""
    hidden = sizes.hidden_size * layout.element
    found: Traffic = Counter()
    found["all_reduce", "tensor"] += hidden * (tokens.text + tokens.words)  # embedding, word head
    # largest logit and index, sum of exponentials and own logit of each masked word
    found["all_reduce", "tensor"] += tokens.words * (3 * FP32 + INT64)

    for stack, (layers, count, _, read) in zip(sizes.STACKS, tokens.stacks(sizes), strict=True):
        if not layers:
            continue
        dense = not sizes.has_experts(stack)
        if layout.sequence_parallel:
            found += split_rows_traffic(layers, count, read, hidden, layout, dense)
        else:
            # attention and, if it is dense, the MLP, forward (again in recomputation) and backward
            passes = 3 if layout.recompute else 2
            each = 2 * passes if dense else passes
            whole = layers if read is None else layers - 1
            last = 0.0 if read is None else count + (each - 1) * read
            found["all_reduce", "tensor"] += hidden * (each * whole * count + last)
        if not dense:
            found += own_rows_traffic(sizes, layers, count, read, hidden, layout)

    return found


def own_rows_traffic(
    sizes: ModelConfig,
    layers: int,
    count: float,
    read: float | None,
    hidden: float,
    layout: Layout,
) -> Traffic:
    """Return the bytes by which the ranks of a stack with experts divide rows, of which each sends
    its own to their experts, and sum the gradients of routers.
    """
    found: Traffic = Counter()
    found["all_reduce", "tensor"] += layers * hidden * sizes.experts
    if not layout.sequence_parallel:  # the results forward, gradients backward
        own = [math.ceil(rows / layout.tensor) for rows in (count, count if read is None else read)]
        passes = 3 if layout.recompute else 2
        found["all_gather", "tensor"] += passes * hidden * (own[0] * (layers - 1) + own[1])

    return found


def split_rows_traffic(
    layers: int, count: float, read: float | None, hidden: float, layout: Layout, dense: bool
) -> Traffic:
    """Return the bytes of a stack whose token rows are split over the ranks; `dense`: with MLPs,
    else with experts, for which rows stay split.
    """
    ranks = layout.tensor
    rows = count + ranks - count % ranks  # at least one empty row
    again = 1 if layout.recompute else 0
    found: Traffic = Counter()
    gathered = hidden * rows / ranks
    whole = layers if read is None else layers - 1

    parts = 2 if dense else 1  # attention and MLP
    found["all_gather", "tensor"] += parts * whole * (3 + again) * gathered
    found["reduce_scatter", "tensor"] += parts * whole * (2 + again) * hidden * rows
    found["all_gather", "tensor"] += gathered  # the split at the start, backward
    if read is None:
        found["all_gather", "tensor"] += gathered  # the join at the end
    else:
        kept = math.ceil(read / ranks) * ranks
        part = hidden * kept / ranks
        found["all_gather", "tensor"] += (3 + 2 * again) * gathered + 2 * part
        found["reduce_scatter", "tensor"] += 2 * hidden * rows + (1 + again) * hidden * kept
        if dense:
            found["all_gather", "tensor"] += (3 + again) * part
            found["reduce_scatter", "tensor"] += (2 + again) * hidden * kept

    found["all_reduce", "tensor"] += layers * 2 * VECTORS * hidden

    return found


def data_traffic(sizes: ModelConfig, layout: Layout, micro_batches: int) -> Traffic:
    """Return the bytes of a step in the data-parallel group, and in the expert-data group."""
    found: Traffic = Counter()
    parts = update_groups(sizes, layout.tensor, layout.data, layout.expert)
    if layout.data > 1:
        found["all_reduce", "data"] += LOSSES * FLOAT64  # the targets of the step
        # norms of each kind of parameter; at stage 3 one, and whether it is finite
        norms = {0: len(parts) - 1, 3: 2}.get(layout.zero_stage, 3)
        found["all_reduce", "data"] += norms * FLOAT64

    for part, groups in parts:
        if part.ranks > 1:
            parameters = parameters_of(sizes, layout)
            found += state_traffic(part, groups, parameters, layout, micro_batches)

    return found


def state_traffic(
    part: Division,
    groups: list[list[int]],
    parameters: int,
    layout: Layout,
    micro_batches: int,
) -> Traffic:
    """Return the bytes of gradients and weights of a part of a rank's `parameters`."""
    group = part.group
    gradients = layout.element * part.elements
    found: Traffic = Counter()

    if layout.shares_nothing:  # on one data-parallel rank the gradients of experts are summed last
        found["all_reduce", group] += gradients if layout.data > 1 else FP32 * part.elements
    elif layout.zero_stage < 3:
        reductions = micro_batches if layout.zero_stage == 2 else 1
        found["all_reduce", group] += reductions * gradients
        found["all_gather", group] += layout.element * sum(shares_of_groups(groups, part.ranks))
    else:
        share = layout.element * sum(math.ceil(count / part.ranks) for count, _ in part.parameters)
        # what was released after its forward pass is gathered once more
        gathers = micro_batches * (1 + max(0, parameters - layout.live) / parameters)
        found["reduce_scatter", group] += micro_batches * part.ranks * share
        if layout.secondary:
            whole = share * part.ranks
            found["all_gather", group] += share
            found["all_gather", "secondary"] += (gathers - 1) * whole / layout.secondary
        else:
            found["all_gather", group] += gathers * share

    return found


def shares_of_groups(groups: list[list[int]], ranks: int) -> list[int]:
    """Return the elements that a rank updates of each of the optimizer's groups, with padding: a
    group is cut into equal parts of an even number of elements.
    """
    return [2 * math.ceil(sum(group) / (2 * ranks)) for group in groups]
