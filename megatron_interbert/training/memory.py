"""Predict a rank's peak memory by arithmetic: weights, gradients, optimizer state, activations.

How DeepSpeed 0.19 keeps its parts was found by counting the allocations of torch on a CPU, which
tests/training/test_memory.py repeats, and those of a dry run. Of the fused GPU kernels only the
activations were counted (in Triton's interpreter). Offload is not covered.
"""

import functools
import math
from dataclasses import dataclass, replace

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.construction import on_meta
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.parallel.vocab_loss import CHUNK

BUCKET = 50_000_000  # most gradients that are reduced at once
SUB_GROUP = 100_000_000  # about as many parameters are updated at once
LIVE = 1_000_000_000  # most parameters that stage 3 keeps gathered
PREFETCH = 50_000_000  # most parameters that stage 3 gathers at once, unless one is larger
# bytes per parameter: of an fp32 value, and of its two Adam moments
FP32 = 4
ADAM = 8
ROW_STATISTICS = 8  # bytes of the mean and deviation that LayerNorm keeps per row
INDEX = 8  # bytes of a row index
# bytes per token and head on a CPU: indices of its query, key, value and result in padded tensors
ROW_NUMBERS = 4 * INDEX


@dataclass(frozen=True)
class Layout:
    """Describe how a model is trained. `fused`: by Triton's kernels, else by those for CPUs."""

    data: int = 1
    tensor: int = 1
    zero_stage: int = 1
    half: bool = False  # 16-bit forward and backward passes
    fused: bool = False
    recompute: bool = False
    sequence_parallel: bool = False
    loss_scale: bool = False  # fp16

    @property
    def shares_nothing(self) -> bool:
        """Check whether ranks share no training state; see training/update.py."""
        return self.zero_stage == 0 or (self.data == 1 and not self.loss_scale)

    @property
    def sharing(self) -> int:
        """Return how many ranks share the activations between a layer's tensor-parallel parts."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def element(self) -> int:
        """Return the bytes of a value in the forward and backward passes."""
        return 2 if self.half else FP32


@dataclass(frozen=True)
class Load:
    """Describe a micro-batch: samples, mean words and regions per sample, and the longest."""

    samples: int
    words: float = 14.0  # with [CLS] and [SEP]
    regions: float = 36.0
    longest_words: int = 0  # 0: as the mean
    longest_regions: int = 0
    masked: float = 0.15


@dataclass(frozen=True)
class Memory:
    """Hold one rank's memory in bytes: what stays, what the forward pass keeps for the backward
    pass, and the peak.
    """

    weights: float  # in the dtype of the passes
    optimizer: float  # moments, and fp32 weights where they are separate
    gradients: float
    buffers: float  # for DeepSpeed's gradient reduction
    activations: float
    peak: float


@functools.cache
def rank_shapes(sizes: ModelConfig, tensor: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the trained parameters on one of `tensor` tensor-parallel ranks."""
    sizes.check_tensor_parallel(tensor)
    model = on_meta(lambda: InterBert(sizes, state=ParallelState(alone=True)))

    return tuple(
        tuple(
            size // tensor if axis == partition_dimension(name) else size
            for axis, size in enumerate(parameter.shape)
        )
        for name, parameter in model.named_parameters()
    )


@functools.cache
def rank_parameters(sizes: ModelConfig, tensor: int) -> int:
    """Count the trained parameters on one of `tensor` tensor-parallel ranks."""
    return sum(map(math.prod, rank_shapes(sizes, tensor)))


@dataclass(frozen=True)
class Stack:
    """Describe a stack of equal layers and the length of a sample in it."""

    layers: int
    heads: int
    hidden_dropout: float
    attention_dropout: float
    tokens: float  # mean per sample
    longest: float  # width of a padded batch
    read: float | None  # tokens computed after the last layer's attention; None: all


def stacks_of(sizes: ModelConfig, load: Load) -> list[Stack]:
    """Describe the stacks of a model: the interaction module and the two streams."""
    image = load.regions + 1
    text_most = max(load.longest_words, load.words)
    image_most = max(load.longest_regions, load.regions) + 1
    words, regions = targets_of(load)
    like_text = (sizes.num_attention_heads, sizes.hidden_dropout, sizes.attention_dropout)
    like_image = (
        sizes.image_attention_heads,
        sizes.image_hidden_dropout,
        sizes.image_attention_dropout,
    )

    return [
        Stack(
            sizes.interaction_layers, *like_text, load.words + image, text_most + image_most, None
        ),
        Stack(sizes.text_layers, *like_text, load.words, text_most, 1 + words),
        Stack(sizes.image_layers, *like_image, image, image_most, 1 + regions),
    ]


def targets_of(load: Load) -> tuple[float, float]:
    """Return how many words and regions of a sample are predicted, on average."""
    return max(1.0, load.masked * load.words), max(1.0, load.masked * load.regions) / 2


def activations(sizes: ModelConfig, layout: Layout, load: Load) -> tuple[float, float]:
    """Return (bytes that a forward pass keeps for the backward pass, bytes of the one layer being
    recomputed: 0 without recomputation).
    """
    hidden = sizes.hidden_size
    total = 0.0
    largest = 0.0

    for stack in stacks_of(sizes, load):
        if not stack.layers:
            continue

        whole = layer_bytes(sizes, layout, stack, stack.tokens)
        total += index_bytes(layout, stack)
        if layout.recompute:
            total += stack.layers * layout.element * hidden * stack.tokens / layout.sharing
            largest = max(largest, whole)
        else:
            read = stack.tokens if stack.read is None else stack.read
            total += (stack.layers - 1) * whole + layer_bytes(sizes, layout, stack, read)

    image = load.regions + 1
    words, regions = targets_of(load)
    masks = 0 if layout.fused or not sizes.hidden_dropout else hidden
    embedded = image * (sizes.feature_dim + hidden + masks) + load.words * (hidden + masks)
    heads = (words + regions) * 3 * hidden + 4 * regions * sizes.num_classes + 6 * sizes.pooled_size
    kept = load.samples * (total + layout.element * (embedded + heads))

    return kept + kept_logits(sizes, layout, load), load.samples * largest


def layer_bytes(sizes: ModelConfig, layout: Layout, stack: Stack, behind: float) -> float:
    """Return the activation bytes that a layer keeps per sample; `behind`: the tokens for which it
    computes what follows attention.
    """
    hidden = sizes.hidden_size
    padded = stack.tokens if layout.fused else stack.longest
    masks = 0.0 if layout.fused or not stack.hidden_dropout else 2 * hidden
    attended = (3 * padded + behind) * hidden / layout.tensor
    if not layout.fused:
        weights = 2 if stack.attention_dropout else 1  # softmax, and the mask of dropout
        attended += weights * padded * stack.longest * stack.heads / layout.tensor

    between = behind * (3 * hidden + masks) + stack.tokens * hidden
    inner = behind * 2 * sizes.ffn_hidden_size / layout.tensor
    statistics = 2 * ROW_STATISTICS * behind

    return (
        layout.element * (attended + inner + between / layout.sharing) + statistics / layout.sharing
    )


def index_bytes(layout: Layout, stack: Stack) -> float:
    """Return the bytes per sample of the row indices into and out of padded batches, which all
    layers of a stack share.
    """
    if layout.fused:
        return 0.0

    back = ROW_NUMBERS * stack.tokens * stack.heads / layout.tensor
    if not layout.recompute:  # indices for padding are freed with the forward pass
        return back

    there = (3 * INDEX + layout.element) * stack.longest * stack.heads / layout.tensor
    places = INDEX * (stack.tokens + stack.longest)

    return back + there + places


def kept_logits(sizes: ModelConfig, layout: Layout, load: Load) -> float:
    """Return the bytes of word logits kept for the backward pass; 0 if computed in chunks."""
    count = logits_at_once(sizes, layout, load)
    return layout.element * count if count < CHUNK else 0.0


def logits_at_once(sizes: ModelConfig, layout: Layout, load: Load) -> float:
    """Return how many word logits exist at a time."""
    words, _ = targets_of(load)
    return min(load.samples * words * sizes.padded_vocab_size / layout.tensor, CHUNK)


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


def predict(sizes: ModelConfig, layout: Layout, load: Load) -> Memory:
    """Predict the memory of a training step (from the second one on, when the moments exist).

    The peak is at one of three times: when the backward pass begins and holds all activations, when
    it ends and holds all gradients, or when these are converted for the optimizer. The step has one
    micro-batch: with gradient accumulation, gradients of earlier ones are held during later passes.
    """
    parameters = rank_parameters(sizes, layout.tensor)
    # the vocabulary table has two gradients: the decoder's and the embedding's
    table = layout.element * sizes.padded_vocab_size * sizes.hidden_size / layout.tensor

    if layout.shares_nothing:
        held = held_alone(layout, parameters, table)
    elif layout.zero_stage == 3:
        held = held_in_stage_3(layout, parameters)
    else:
        held = held_in_stages_1_and_2(layout, parameters, table)

    kept, again = activations(sizes, layout, load)
    # the fused kernel writes the gradient over the logits
    each = layout.element if layout.fused else 2 * FP32
    logits = each * logits_at_once(sizes, layout, load) - kept_logits(sizes, layout, load)
    begin = held.begin + kept + max(again, logits + table)
    peak = held.weights + held.optimizer + max(begin, held.end + again, held.step)

    return Memory(held.weights, held.optimizer, held.gradients, held.buffers, kept + again, peak)


def held_alone(layout: Layout, parameters: int, table: float) -> Held:
    """Return what a rank holds if ranks share no training state."""
    weights = layout.element * parameters
    gradients = weights
    buffers = layout.element * min(parameters, BUCKET) if layout.data > 1 else 0.0
    copies = FP32 * parameters if layout.half else 0  # fp32 weights; in the step, fp32 gradients

    return Held(
        weights=weights,
        optimizer=copies + ADAM * parameters,
        gradients=gradients,
        buffers=buffers,
        begin=0.0,
        end=gradients + max(buffers, table),
        step=gradients + copies,
    )


def held_in_stage_3(layout: Layout, parameters: int) -> Held:
    """Return what a rank holds at ZeRO stage 3; gradients stay allocated after a step."""
    share = layout.element * parameters / layout.data
    bucket = layout.element * min(parameters, BUCKET)
    gathered = layout.element * min(parameters, LIVE)
    received = layout.element * min(parameters, PREFETCH)
    kept = share + bucket  # gradients and their buffer

    return Held(
        weights=share,
        optimizer=(FP32 + ADAM) * parameters / layout.data,
        gradients=share,
        buffers=bucket,
        begin=kept + (gathered + received if layout.data > 1 else 0.0),
        end=kept + gathered + bucket,
        step=kept + updated_bytes(layout, parameters),
    )


def held_in_stages_1_and_2(layout: Layout, parameters: int, table: float) -> Held:
    """Return what a rank holds at ZeRO stages 1 and 2 (at 2 gradients are sharded too)."""
    whole = layout.element * parameters
    share = whole / layout.data
    bucket = layout.element * min(parameters, BUCKET)
    gradients = whole if layout.zero_stage == 1 else share
    # the gradients of a full bucket are joined while the next one is filled
    joined = bucket if parameters > BUCKET else 0.0

    return Held(
        weights=whole,
        optimizer=(FP32 + ADAM) * parameters / layout.data,
        gradients=gradients,
        buffers=bucket + joined,
        begin=bucket + joined,
        end=gradients + bucket + joined + table * (layout.zero_stage == 1),
        step=gradients + updated_bytes(layout, parameters),
    )


def updated_bytes(layout: Layout, parameters: int) -> float:
    """Return the bytes of the gradients of the parameters that are updated at once: joined, and
    converted to fp32 if they are not.
    """
    at_once = min(parameters, SUB_GROUP) / layout.data
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
