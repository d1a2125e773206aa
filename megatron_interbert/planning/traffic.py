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
    Layout,
    Load,
    rank_parameters,
    rank_shapes,
    targets_of,
    update_groups,
)

FLOAT64 = 8
INT64 = 8
LOSSES = 3
VECTORS = 3  # replicated parameters of a norm, whose gradients are summed where rows are split

# (operation, group) -> bytes; operations are all_reduce, all_gather and reduce_scatter
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
        found["all_reduce", "tensor"] += 2 * FLOAT64  # the norm

    if layout.data > 1:
        found += data_traffic(sizes, layout, len(micro_batches))

    return found


def tensor_traffic(sizes: ModelConfig, layout: Layout, tokens: Tokens) -> Traffic:
    """Return the bytes in the tensor-parallel group of one micro-batch, forward and backward."""
    hidden = sizes.hidden_size * layout.element
    found: Traffic = Counter()
    found["all_reduce", "tensor"] += hidden * (tokens.text + tokens.words)  # embedding, word head
    # largest logit and index, sum of exponentials and own logit of each masked word
    found["all_reduce", "tensor"] += tokens.words * (3 * FP32 + INT64)

    for layers, count, _, read in tokens.stacks(sizes):
        if not layers:
            continue
        if layout.sequence_parallel:
            found += split_rows_traffic(layers, count, read, hidden, layout)
        else:
            # attention and MLP, forward (again in recomputation) and backward
            each = 6 if layout.recompute else 4
            whole = layers if read is None else layers - 1
            last = 0.0 if read is None else count + (each - 1) * read
            found["all_reduce", "tensor"] += hidden * (each * whole * count + last)

    return found


def split_rows_traffic(
    layers: int, count: float, read: float | None, hidden: float, layout: Layout
) -> Traffic:
    """Return the bytes of a stack whose token rows are split over the ranks."""
    ranks = layout.tensor
    rows = count + ranks - count % ranks  # at least one empty row
    again = 1 if layout.recompute else 0
    found: Traffic = Counter()
    gathered = hidden * rows / ranks
    whole = layers if read is None else layers - 1

    found["all_gather", "tensor"] += whole * (6 + 2 * again) * gathered
    found["reduce_scatter", "tensor"] += whole * (4 + 2 * again) * hidden * rows
    found["all_gather", "tensor"] += gathered  # the split at the start, backward
    if read is None:
        found["all_gather", "tensor"] += gathered  # the join at the end
    else:
        kept = math.ceil(read / ranks) * ranks
        part = hidden * kept / ranks
        found["all_gather", "tensor"] += (3 + 2 * again) * gathered + (5 + again) * part
        found["reduce_scatter", "tensor"] += 2 * hidden * rows + (3 + 2 * again) * hidden * kept

    found["all_reduce", "tensor"] += layers * 2 * VECTORS * hidden

    return found


def data_traffic(sizes: ModelConfig, layout: Layout, micro_batches: int) -> Traffic:
    """Return the bytes in the data-parallel group of a step."""
    parameters = rank_parameters(sizes, layout.tensor)
    gradients = layout.element * parameters
    found: Traffic = Counter()
    found["all_reduce", "data"] += LOSSES * FLOAT64  # the targets of the step

    if layout.zero_stage == 0:
        found["all_reduce", "data"] += gradients
    elif layout.zero_stage < 3:
        reductions = micro_batches if layout.zero_stage == 2 else 1
        found["all_reduce", "data"] += reductions * gradients + 2 * FLOAT64  # and the norm
        found["all_gather", "data"] += layout.element * sum(shares_of_groups(sizes, layout))
    else:
        share = layout.element * sum(shares_of_parameters(sizes, layout))
        # what was released after its forward pass is gathered once more
        gathers = micro_batches * (1 + max(0, parameters - layout.live) / parameters)
        found["all_reduce", "data"] += 2 * FLOAT64  # the norm, and whether it is finite
        found["reduce_scatter", "data"] += micro_batches * layout.data * share
        if layout.secondary:
            whole = share * layout.data
            found["all_gather", "data"] += share
            found["all_gather", "secondary"] += (gathers - 1) * whole / layout.secondary
        else:
            found["all_gather", "data"] += gathers * share

    return found


def shares_of_groups(sizes: ModelConfig, layout: Layout) -> list[int]:
    """Return the elements that a rank updates of each of the optimizer's groups, with padding: a
    group is cut into equal parts of an even number of elements.
    """
    groups = update_groups(sizes, layout.tensor, layout.data)
    return [2 * math.ceil(sum(group) / (2 * layout.data)) for group in groups]


def shares_of_parameters(sizes: ModelConfig, layout: Layout) -> list[int]:
    """Return the elements that a rank keeps of each parameter at ZeRO stage 3, with padding."""
    shapes = rank_shapes(sizes, layout.tensor).values()
    return [math.ceil(math.prod(shape) / layout.data) for shape in shapes]
