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
def rank_values(sizes: ModelConfig, tensor: int) -> int:
    """Count the trained parameters of one rank."""
    sizes.check_tensor_parallel(tensor)

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        parameters = InterBert(sizes, state=ParallelState(alone=True)).named_parameters()
        return sum(
            p.numel() // (1 if partition_dimension(name) is None else tensor)
            for name, p in parameters
        )


def activations(sizes: ModelConfig, layout: Layout, load: Load) -> tuple[float, float]:
    """Give (Bytes that a forward pass keeps for the backward pass, bytes of the one layer that is
    computed again, if any).
    """
    hidden = sizes.hidden_size
    ffn = sizes.ffn_hidden_size
    element = layout.element
    image = load.regions + 1
    sharing = layout.tensor if layout.sequence_parallel else 1
    text_most = max(load.longest_words, load.words)
    image_most = max(load.longest_regions, load.regions) + 1

    def layer(
        tokens: float,
        longest: float,
        heads: int,
        hidden_p: float,
        attention_p: float,
        read: float | None = None,
    ) -> float:
        """Of one sample.

        `read`: tokens behind the attention, where the last layer is computed for these only.
        """
        behind = tokens if read is None else read
        padded = tokens if layout.fused else longest
        masks = 0.0 if layout.fused or not hidden_p else 2 * hidden
        attended = (3 * padded + behind) * hidden / layout.tensor
        if not layout.fused:
            weights = 2 if attention_p else 1  # softmax, and the mask of dropout
            attended += weights * padded * longest * heads / layout.tensor

        between = behind * (3 * hidden + masks) + tokens * hidden
        inner = behind * 2 * ffn / layout.tensor

        return (
            element * (attended + inner + between / sharing) + 2 * ROW_STATISTICS * behind / sharing
        )

    def numbers(tokens: float, longest: float, heads: int) -> float:
        """Of one sample: where rows come from and go to, which all layers of a stack share."""
        if layout.fused:
            return 0.0

        back = ROW_NUMBERS * tokens * heads / layout.tensor
        if not layout.recompute:  # what the way there needs is gone with the forward pass
            return back

        there = (3 * INDEX + element) * longest * heads / layout.tensor
        places = INDEX * (tokens + longest)

        return back + there + places

    words = max(1.0, load.masked * load.words)
    shown = max(1.0, load.masked * load.regions) / 2
    like_text = (sizes.num_attention_heads, sizes.hidden_dropout, sizes.attention_dropout)
    like_image = (
        sizes.image_attention_heads,
        sizes.image_hidden_dropout,
        sizes.image_attention_dropout,
    )
    joint = (load.words + image, text_most + image_most, *like_text)
    stacks = [
        (sizes.interaction_layers, joint, None),
        (sizes.text_layers, (load.words, text_most, *like_text), 1 + words),
        (sizes.image_layers, (image, image_most, *like_image), 1 + shown),
    ]
    total = largest = 0.0

    for count, shape, read in stacks:
        whole = layer(*shape)
        total += numbers(*shape[:3]) if count else 0.0
        if layout.recompute:
            total += count * element * hidden * shape[0] / sharing
            largest = max(largest, whole if count else 0.0)
        elif count:
            total += (count - 1) * whole + layer(*shape, read)

    masks = 0 if layout.fused or not sizes.hidden_dropout else hidden
    embedded = image * (sizes.feature_dim + hidden + masks) + load.words * (hidden + masks)
    heads = (words + shown) * 3 * hidden + 4 * shown * sizes.num_classes + 6 * sizes.pooled_size
    kept = load.samples * (total + element * (embedded + heads)) + kept_logits(sizes, layout, load)

    return kept, load.samples * largest


def kept_logits(sizes: ModelConfig, layout: Layout, load: Load) -> float:
    """Give the bytes of word logits that wait for the backward pass: of one chunk, or none."""
    count = logits_at_once(sizes, layout, load)
    return layout.element * count if count < CHUNK else 0.0


def logits_at_once(sizes: ModelConfig, layout: Layout, load: Load) -> float:
    """Count the word logits that exist at a time."""
    targets = load.samples * max(1.0, load.masked * load.words)
    return min(targets * sizes.padded_vocab_size / layout.tensor, CHUNK)


def predict(sizes: ModelConfig, layout: Layout, load: Load) -> Memory:
    """Predict memory of a training step (the second one, when the moments are there).

    A step is largest at one of three times: when the backward pass begins and holds all
    activations, when it ends and holds all gradients, or when these are converted for the
    optimizer. A step of one micro-batch, that is: with more of them, what the first ones gave is
    held during the passes of the others too.
    """
    values = rank_values(sizes, layout.tensor)
    element = layout.element
    ranks = layout.data
    all_of = element * values
    share = element * values / ranks
    bucket = element * min(values, BUCKET)
    # it has two gradients, of decoder and embedding
    table = element * sizes.padded_vocab_size * sizes.hidden_size / layout.tensor
    converted = FP32 * values / ranks if layout.half else 0.0
    optimizer = (FP32 + ADAM) * values / ranks

    if layout.shares_nothing:
        weights = all_of
        gradients = all_of
        buffers = bucket if ranks > 1 else 0.0
        begin = 0.0
        end = gradients + max(buffers, table)
        step = gradients

        if layout.half:
            step += FP32 * values
        else:
            optimizer = ADAM * values
    elif layout.zero_stage == 3:
        # both stay from the first step on
        weights = share
        gradients = share
        buffers = bucket
        # Gathered weights, all of a model of this kind, and the memory in which they arrive.
        whole = 2 * all_of if ranks > 1 else 0.0
        begin = gradients + bucket + whole
        end = gradients + bucket + 2 * all_of
        step = gradients + bucket + share + converted
    else:
        weights = all_of
        buffers = bucket
        gradients = all_of if layout.zero_stage == 1 else share
        begin = bucket
        end = gradients + bucket + table * (layout.zero_stage == 1)
        step = gradients + share + converted

    kept, again = activations(sizes, layout, load)
    each = element if layout.fused else 2 * FP32  # fused, the gradient takes the logits' own memory
    logits = each * logits_at_once(sizes, layout, load) - kept_logits(sizes, layout, load)
    peak = weights + optimizer + max(begin + kept + max(again, logits + table), end + again, step)

    return Memory(weights, optimizer, gradients, buffers, kept + again, peak)


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
