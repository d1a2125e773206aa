"""Predict the bytes that a forward pass keeps for the backward pass.

Those of plain torch operations were counted by torch's profiler on a CPU, those of the fused GPU
kernels in Triton's interpreter: tests/planning/test_memory.py repeats both.
"""

from dataclasses import dataclass

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.parallel.vocab_loss import CHUNK
from megatron_interbert.planning.layout import FP32, Layout, Load, targets_of

ROW_STATISTICS = 8  # bytes of the mean and deviation that LayerNorm keeps per row
INDEX = 8  # bytes of a row index
# bytes per token and head on a CPU: indices of its query, key, value and result in padded tensors
ROW_NUMBERS = 4 * INDEX
ROUTED_NUMBERS = 8  # places of a token's row by token, expert and rank, forward and backward


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
    has_experts: bool = False


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
            sizes.interaction_layers,
            *like_text,
            *(load.words + image, text_most + image_most, None),
            sizes.has_experts("interaction"),
        ),
        Stack(
            sizes.text_layers,
            *like_text,
            *(load.words, text_most, 1 + words),
            sizes.has_experts("text"),
        ),
        Stack(
            sizes.image_layers,
            *like_image,
            *(image, image_most, 1 + regions),
            sizes.has_experts("image"),
        ),
    ]


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
    if stack.has_experts:
        inner *= sizes.prototypes
        attended += routed_elements(sizes, layout) * behind / layout.tensor
    statistics = 2 * ROW_STATISTICS * behind

    return (
        layout.element * (attended + inner + between / layout.sharing) + statistics / layout.sharing
    )


def routed_elements(sizes: ModelConfig, layout: Layout) -> float:
    """Return what a layer keeps of each token for its experts, in elements of the passes: its rows
    as they arrive and the results, the router's input and probabilities in fp32, and row numbers.
    """
    rows = 2 * sizes.hidden_size * sizes.prototypes
    wide = sizes.experts + (sizes.hidden_size if layout.half else 0)
    numbers = ROUTED_NUMBERS * INDEX * sizes.prototypes

    return rows + (FP32 * wide + numbers) / layout.element


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
