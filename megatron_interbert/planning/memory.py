"""Predict a rank's memory by arithmetic: on its device, its host and its disk.

How DeepSpeed 0.19 keeps its parts was found by counting the allocations of torch on a CPU, which
tests/planning/test_memory.py repeats, and those of a dry run.
"""

from dataclasses import dataclass, replace

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.planning.activations import activations, kept_logits, logits_at_once
from megatron_interbert.planning.layout import (
    ADAM,
    FP32,
    ON_DEVICE,
    ON_DISK,
    Layout,
    Load,
    largest_parameter,
    largest_share,
    largest_unit,
    parameters_of,
    partly_updated,
    rank_parameters,
    share_of_rank,
    targets_of,
    updated_at_once,
)

FLOAT64 = 8
NORM_AT_ONCE = 250_000_000  # elements of a gradient whose norm DeepSpeed takes in float64


@dataclass(frozen=True)
class Memory:
    """Hold one rank's memory in bytes: on the device what stays, what the forward pass keeps for
    the backward pass, and the peak; and what offload puts on the host and on its disk.
    """

    weights: float  # in the dtype of the passes
    optimizer: float  # moments, and fp32 weights where they are separate
    gradients: float
    buffers: float  # for DeepSpeed's gradient reduction
    activations: float
    peak: float
    copy: float = 0.0  # of the weights, for evaluations
    host: float = 0.0
    disk: float = 0.0

    @property
    def together(self) -> float:
        """Return the peak where device and host are the same memory: on a CPU."""
        return self.peak + self.host


@dataclass(frozen=True)
class Held:
    """Hold one rank's bytes except activations: what stays, and what exists beside weights and
    optimizer state when the backward pass begins, when it ends, and in the optimizer's step.
    """

    weights: float
    optimizer: float
    gradients: float
    buffers: float
    begin: float
    end: float
    step: float
    host: float = 0.0
    disk: float = 0.0


def predict(sizes: ModelConfig, layout: Layout, load: Load) -> Memory:
    """Predict the memory of a training step (from the second one on, when the moments exist).

    The peak is at one of four times: when the backward pass begins and holds all activations, when
    it ends and holds all gradients, when these are converted for the optimizer, or when a copy of
    the weights is gathered to evaluate (activations of evaluations are left out). With several
    micro-batches the gradients of earlier ones are held when a later pass begins.
    """
    parameters = parameters_of(sizes, layout)
    share = share_of_rank(sizes, layout)
    # the vocabulary table has two gradients: the decoder's and the embedding's
    table = layout.element * sizes.padded_vocab_size * sizes.hidden_size / layout.tensor
    if not targets_of(load)[0]:  # a task without word losses
        table = 0.0

    if layout.shares_nothing:
        held = held_alone(layout, parameters, table)
    elif layout.zero_stage == 3:
        largest = largest_parameter(sizes, layout.tensor, layout.expert)
        held = held_in_stage_3(with_live(sizes, layout), parameters, share, largest)
    else:
        held = held_in_stages_1_and_2(sizes, layout, table)
    if layout.averaged:
        average = FP32 * (parameters if layout.zero_stage == 0 else share)
        held = replace(held, optimizer=held.optimizer + average)
    if layout.optimizer_on != ON_DEVICE:
        held = offload_optimizer(held, layout, sizes)
    if layout.parameters_on != ON_DEVICE:
        held = offload_parameters(held, layout, sizes)
    kept, again = activations(sizes, layout, load)
    # the fused kernel writes the gradient over the logits
    each = layout.element if layout.fused else 2 * FP32
    logits = each * logits_at_once(sizes, layout, load) - kept_logits(sizes, layout, load)
    begin = held.begin + kept + max(again, logits + table)
    evaluating = held.gradients + held.buffers + gathered_to_evaluate(sizes, layout)
    peak = held.weights + held.optimizer + max(begin, held.end + again, held.step, evaluating)
    evaluated = rank_parameters(sizes, layout.tensor)  # with all experts
    copy = layout.copied * evaluated / (layout.data if layout.shares_copy else 1)
    on_host = layout.shares_copy and layout.parameters_on != ON_DEVICE

    return Memory(
        held.weights,
        held.optimizer,
        held.gradients,
        held.buffers,
        kept + again,
        peak + (0.0 if on_host else copy),
        copy,
        held.host + (copy if on_host else 0.0),
        held.disk,
    )


def held_alone(layout: Layout, parameters: int, table: float) -> Held:
    """Return what a rank holds if ranks share no training state."""
    weights = layout.element * parameters
    gradients = weights
    buffers = layout.element * min(parameters, layout.bucket) if layout.data > 1 else 0.0
    copies = FP32 * parameters if layout.half else 0  # fp32 weights; in the step, fp32 gradients

    return Held(
        weights=weights,
        optimizer=copies + ADAM * parameters,
        gradients=gradients,
        buffers=buffers,
        begin=gradients if layout.accumulates else 0.0,
        end=gradients + max(buffers, table),
        step=gradients + copies,
    )


def with_live(sizes: ModelConfig, layout: Layout) -> Layout:
    """Return a layout with the parameters that are really kept gathered: of those that are on a
    disk alone, only what is computed with; see engine_settings in training/engine.py.
    """
    if layout.parameters_on != ON_DISK:
        return layout

    largest = largest_parameter(sizes, layout.tensor, layout.expert)
    kept = layout.in_memory * layout.data + largest
    return replace(layout, live=min(layout.live, kept))


def held_in_stage_3(layout: Layout, parameters: int, elements: float, largest: int) -> Held:
    """Return what a rank holds at ZeRO stage 3, where it keeps the state of `elements` of its
    `parameters`, of which `largest` are one; gradients stay allocated after a step.

    A secondary part of a weight exists from its first release to the end of the step.
    """
    share = layout.element * elements
    again = layout.element * parameters / layout.secondary if layout.secondary else 0.0
    released = max(0.0, 1 - layout.live / parameters)  # share of the weights, before the end
    bucket = layout.element * min(parameters, layout.bucket)
    at_once = min(1.0, layout.sub_group / parameters)  # share that is updated
    gathered = layout.element * min(parameters, layout.live)
    at_a_time = max(layout.prefetch, largest) if layout.prefetch else 0
    received = layout.element * min(parameters, at_a_time)
    kept = share + bucket  # gradients and their buffer

    return Held(
        weights=share,
        optimizer=(FP32 + ADAM) * elements,
        gradients=share,
        buffers=bucket,
        begin=kept + again * released + (gathered + received if layout.data > 1 else 0.0),
        end=kept + again * (released > 0) + gathered + bucket,
        step=kept + again + updated_bytes(layout, elements * at_once),
    )


def held_in_stages_1_and_2(sizes: ModelConfig, layout: Layout, table: float) -> Held:
    """Return what a rank holds at ZeRO stages 1 and 2.

    DeepSpeed copies the gradients of the parameters of which a rank updates at least a part to one
    place, and at stage 2 keeps no others. There this place is reserved when the first bucket is
    full, with nearly all activations still held. For offload see `offload_optimizer`.
    """
    parameters = parameters_of(sizes, layout)
    whole = layout.element * parameters
    copied = layout.element * partly_updated(*divided(sizes, layout))
    bucket = layout.element * min(parameters, layout.bucket)
    gradients = whole if layout.zero_stage == 1 else copied
    several = parameters > layout.bucket
    # the gradients of a full bucket are joined while the next one is filled
    joined = bucket if several else 0.0
    reserved = several and layout.zero_stage == 2 and layout.optimizer_on == ON_DEVICE

    return Held(
        weights=whole,
        optimizer=(FP32 + ADAM) * share_of_rank(sizes, layout),
        gradients=gradients,
        buffers=bucket + joined,
        begin=bucket + joined + (gradients if layout.accumulates or reserved else 0.0),
        end=gradients + bucket + joined + (table + copied) * (layout.zero_stage == 1),
        step=gradients + updated_bytes(layout, updated_at_once(*divided(sizes, layout))),
    )


def offload_optimizer(held: Held, layout: Layout, sizes: ModelConfig) -> Held:
    """Return what a rank holds if fp32 weights, moments and the update are on its host, or on its
    disk. Found in DeepSpeed's code and by dry runs: at stages 1 and 2 each gradient of what the
    rank updates goes to the host as it is reduced.
    """
    largest = largest_parameter(sizes, layout.tensor, layout.expert)
    share = share_of_rank(sizes, layout)
    passed = layout.element * share  # gradients at stage 3, weights below, on their way
    state = (2 * FP32 + ADAM) * share  # with the gradients of the update
    average = held.optimizer - (FP32 + ADAM) * share  # of the weights, if one is kept
    found = replace(held, optimizer=0.0, step=0.0, host=passed + average)

    if layout.zero_stage == 3:
        in_norm = FLOAT64 * min(largest_share(*divided(sizes, layout)), NORM_AT_ONCE)
        end = held.end - passed + in_norm
        found = replace(found, gradients=0.0, begin=held.begin - passed, end=end)
    else:
        copied = layout.element * partly_updated(*divided(sizes, layout))
        in_norm = FLOAT64 * min(largest, NORM_AT_ONCE)
        end = held.end - copied
        found = replace(found, end=end + in_norm, host=found.host + FP32 * largest)
        if layout.zero_stage == 2:
            # the sums of several micro-batches, in 16 bits; an addend is on the device too
            summed = copied if layout.accumulates else 0.0
            # a bucket that holds all gradients is joined at the end
            whole = held.buffers if held.buffers < layout.element * layout.bucket else 0.0
            found = replace(
                found,
                gradients=summed,
                begin=held.begin - summed,
                end=end + whole + max(in_norm, summed),
                host=found.host + summed,
            )

    if layout.optimizer_on == ON_DISK:
        at_once = layout.swap_buffers * FP32 * min(share, layout.sub_group)
        return replace(found, host=found.host + at_once, disk=state)

    return replace(found, host=found.host + state)


def offload_parameters(held: Held, layout: Layout, sizes: ModelConfig) -> Held:
    """Return what a rank holds if its share of the weights is on its host, or on its disk."""
    found = replace(held, weights=0.0)
    if layout.parameters_on == ON_DISK:
        each = layout.parameter_buffer or largest_share(*divided(sizes, layout))
        share = share_of_rank(sizes, layout)
        at_once = layout.parameter_buffers * each + min(share, layout.in_memory)
        if share > layout.in_memory:  # a group of the update on its way to the disk
            at_once += min(share, layout.sub_group)
        at_once *= layout.element
        return replace(found, host=held.host + at_once, disk=held.disk + held.weights)

    return replace(found, host=held.host + held.weights)


def divided(sizes: ModelConfig, layout: Layout) -> tuple[ModelConfig, int, int, int]:
    """Return the arguments of functions on how a layout divides parameters."""
    return sizes, layout.tensor, layout.data, layout.expert


def gathered_to_evaluate(sizes: ModelConfig, layout: Layout) -> float:
    """Return the bytes that are gathered at once of a copy that ranks share: what stays, and a unit
    for another rank.
    """
    if not layout.shares_copy:
        return 0.0

    unit = largest_unit(sizes, layout.tensor)
    stays = min(rank_parameters(sizes, layout.tensor), max(layout.live, unit))

    return layout.copied * (stays + (unit if layout.data > 1 else 0))


def updated_bytes(layout: Layout, at_once: float) -> float:
    """Return the bytes of the gradients of a rank's part of the parameters that are updated at
    once: joined, and converted to fp32 unless they are in fp32 already.
    """
    return at_once * (layout.element + FP32 if layout.half else layout.element)


def largest_micro_batch(
    sizes: ModelConfig, layout: Layout, load: Load, room: float, most: int = 1 << 16
) -> int:
    """Return the most samples, up to `most`, whose peak fits in `room` bytes; 0 if none fit."""
    low = 0
    high = most
    while low < high:
        middle = (low + high + 1) // 2
        if predict(sizes, layout, replace(load, samples=middle)).peak <= room:
            low = middle
        else:
            high = middle - 1

    return low
