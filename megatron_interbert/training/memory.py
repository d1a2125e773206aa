"""What a rank's memory holds at its peak, by arithmetic: weights, gradients, optimizer,
activations.

How DeepSpeed 0.19 keeps its parts was found by counting what torch's allocator gives out on a CPU;
tests/training/test_memory.py counts again. Of the fused kernels, for GPUs, only the activations are
counted (in Triton's interpreter).
"""

import functools
from dataclasses import dataclass, replace

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.parallel.vocab_loss import CHUNK

BUCKET = 500_000_000  # most gradients that are reduced at once
# bytes of a value; of its two moments
FP32 = 4
ADAM = 8
ROW_STATISTICS = 8  # mean and deviation that a norm keeps of a row
INDEX = 8  # bytes of the number of a row
# of each token and head on a CPU: where its query, key, value and result are among padded ones
ROW_NUMBERS = 4 * INDEX


@dataclass(frozen=True)
class Layout:
    """How a model is trained. `fused`: by Triton's kernels, else by those of a CPU."""

    data: int = 1
    tensor: int = 1
    zero_stage: int = 1
    half: bool = False  # passes in 16 bits
    fused: bool = False
    recompute: bool = False
    sequence_parallel: bool = False
    loss_scale: bool = False  # the 16 bits are fp16's

    @property
    def shares_nothing(self) -> bool:
        """Whether the update is ours, of all weights: see training/update.py."""
        return self.zero_stage == 0 or (self.data == 1 and not self.loss_scale)

    @property
    def sharing(self) -> int:
        """Ranks that share the activations between the tensor-parallel parts of a layer."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def element(self) -> int:
        """Bytes of a value in the passes."""
        return 2 if self.half else FP32


@dataclass(frozen=True)
class Load:
    """A micro-batch: samples, tokens and regions of each, and the longest of them."""

    samples: int
    words: float = 14.0  # with [CLS] and [SEP]
    regions: float = 36.0
    longest_words: int = 0  # default: as the mean
    longest_regions: int = 0
    masked: float = 0.15


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what stays, what the forward pass keeps for the backward pass, and the
    peaks.
    """

    weights: float  # in the type of the passes
    optimizer: float  # fp32 weights, where they are others, and moments
    gradients: float
    buffers: float  # of DeepSpeed's reductions and of its step
    activations: float
    peak: float


@functools.cache
def rank_parameters(sizes: ModelConfig, tensor: int) -> int:
    """Count the trained parameters of one rank."""
    sizes.check_tensor_parallel(tensor)

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        parameters = InterBert(sizes, state=ParallelState(alone=True)).named_parameters()
        return sum(
            p.numel() // (1 if partition_dimension(name) is None else tensor)
            for name, p in parameters
        )


@dataclass(frozen=True)
class Stack:
    """Layers of one kind and what a sample brings to them."""

    layers: int
    heads: int
    hidden_dropout: float
    attention_dropout: float
    tokens: float  # mean
    longest: float  # columns of a padded batch
    read: float | None  # tokens behind the attention of the last layer; None: all


def stacks_of(sizes: ModelConfig, load: Load) -> list[Stack]:
    """Describe the interaction module and the two streams."""
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
    """Return the words and the regions of a sample that are predicted, on average."""
    return max(1.0, load.masked * load.words), max(1.0, load.masked * load.regions) / 2


def activations(sizes: ModelConfig, layout: Layout, load: Load) -> tuple[float, float]:
    """Return the bytes that a forward pass keeps for the backward pass, and the bytes of the one
    layer that is recomputed, if any.
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
    """Return the bytes of activations that a layer keeps of one sample; `behind`: the tokens for
    which it computes what follows its attention.
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
    """Return the bytes of one sample's row numbers, of where rows come from and go to in padded
    batches, which all layers of a stack share.
    """
    if layout.fused:
        return 0.0

    back = ROW_NUMBERS * stack.tokens * stack.heads / layout.tensor
    if not layout.recompute:  # what the way there needs is gone with the forward pass
        return back

    there = (3 * INDEX + layout.element) * stack.longest * stack.heads / layout.tensor
    places = INDEX * (stack.tokens + stack.longest)

    return back + there + places


def kept_logits(sizes: ModelConfig, layout: Layout, load: Load) -> float:
    """Give the bytes of word logits that wait for the backward pass: of one chunk, or none."""
    count = logits_at_once(sizes, layout, load)
    return layout.element * count if count < CHUNK else 0.0


def logits_at_once(sizes: ModelConfig, layout: Layout, load: Load) -> float:
    """Count the word logits that exist at a time."""
    words, _ = targets_of(load)
    return min(load.samples * words * sizes.padded_vocab_size / layout.tensor, CHUNK)


@dataclass(frozen=True)
class Held:
    """Bytes of one rank but for activations: what stays, and what is there beside weights and
    moments when the backward pass begins, when it ends, and in the optimizer's step.
    """

    weights: float
    optimizer: float
    gradients: float
    buffers: float
    begin: float
    end: float
    step: float


def predict(sizes: ModelConfig, layout: Layout, load: Load) -> Memory:
    """Predict the memory of a training step (the second one, when the moments are there).

    A step is largest at one of three times: when the backward pass begins and holds all
    activations, when it ends and holds all gradients, or when these are converted for the
    optimizer. This is a step of one micro-batch: with more of them, the gradients of the first ones
    are also held during the passes of the others.
    """
    parameters = rank_parameters(sizes, layout.tensor)
    # its two gradients: of the decoder and of the embedding
    table = layout.element * sizes.padded_vocab_size * sizes.hidden_size / layout.tensor

    if layout.shares_nothing:
        held = held_alone(layout, parameters, table)
    elif layout.zero_stage == 3:
        held = held_in_stage_3(layout, parameters)
    else:
        held = held_in_stages_1_and_2(layout, parameters, table)

    kept, again = activations(sizes, layout, load)
    # fused, the gradient takes the logits' own memory
    each = layout.element if layout.fused else 2 * FP32
    logits = each * logits_at_once(sizes, layout, load) - kept_logits(sizes, layout, load)
    begin = held.begin + kept + max(again, logits + table)
    peak = held.weights + held.optimizer + max(begin, held.end + again, held.step)

    return Memory(held.weights, held.optimizer, held.gradients, held.buffers, kept + again, peak)


def held_alone(layout: Layout, parameters: int, table: float) -> Held:
    """Return what a rank holds that shares no state with others."""
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
    """Return what a rank holds that shares everything; gradients too stay from the first step
    on.
    """
    whole = layout.element * parameters
    share = whole / layout.data
    bucket = layout.element * min(parameters, BUCKET)
    # gathered weights, all of a model of this size, and the memory in which they arrive
    gathered = 2 * whole if layout.data > 1 else 0.0

    return Held(
        weights=share,
        optimizer=(FP32 + ADAM) * parameters / layout.data,
        gradients=share,
        buffers=bucket,
        begin=share + bucket + gathered,
        end=share + bucket + 2 * whole,
        step=share + bucket + share + converted_bytes(layout, parameters),
    )


def held_in_stages_1_and_2(layout: Layout, parameters: int, table: float) -> Held:
    """Return what a rank holds that shares the optimizer's state and, in stage 2, gradients."""
    whole = layout.element * parameters
    share = whole / layout.data
    bucket = layout.element * min(parameters, BUCKET)
    gradients = whole if layout.zero_stage == 1 else share

    return Held(
        weights=whole,
        optimizer=(FP32 + ADAM) * parameters / layout.data,
        gradients=gradients,
        buffers=bucket,
        begin=bucket,
        end=gradients + bucket + table * (layout.zero_stage == 1),
        step=gradients + share + converted_bytes(layout, parameters),
    )


def converted_bytes(layout: Layout, parameters: int) -> float:
    """Return the bytes of a rank's gradients as fp32, which the optimizer needs."""
    return FP32 * parameters / layout.data if layout.half else 0.0


def largest_micro_batch(
    sizes: ModelConfig, layout: Layout, load: Load, room: float, most: int = 1 << 16
) -> int:
    """Give the most samples whose peak stays within `room` bytes.

    0 where one sample is too many.
    """
    low = 0
    high = most
    while low < high:
        middle = (low + high + 1) // 2
        if predict(sizes, layout, replace(load, samples=middle)).peak <= room:
            low = middle
        else:
            high = middle - 1

    return low
