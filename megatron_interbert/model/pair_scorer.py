"""Score all pairs of some images and captions as the model does, with little computed twice.

Computed once per image or caption, because it does not depend on the partner: the embeddings and,
token by token, the first layer's queries, keys and values. Computed per pair, only as far as the
matching head depends on it: the last layer of each stream computes keys and values of all its
tokens, and everything else for its first token only, which is the one that is pooled. Word and
region heads are not run. A token attends to the same tokens as in `InterBert.forward`, so the
scores are equal up to rounding.

The layout of pairs is computed on the host and sent: the host never waits for the device, but runs
ahead of it until scores are read.

Legend: n tokens of one side, N tokens of all pairs, H hidden size, B pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.sending import send_batch, send_indexes
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.sequences import Sequences, padded_places
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.transformer import SelfAttention, TransformerStack


@dataclass
class Side:
    """Hold images or captions prepared for scoring.

    On the device: embeddings [n, H] and the first layer's QKV projection [n, 3 H / ranks]. On the
    host: int64 offsets [items + 1] of their tokens.
    """

    hidden: torch.Tensor
    qkv: torch.Tensor
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each item, int64 [items]."""
        return np.diff(self.offsets)

    def rows(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows of the tokens of some items [B], end to end; lengths of the items [B])."""
        starts = self.offsets[items]
        lengths = self.offsets[items + 1] - starts
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths), lengths


@dataclass
class PairLayout:
    """Hold where the tokens of B pairs come from and where they go: each pair's image tokens, then
    its text tokens.

    On the device, int64: rows of the sides, their places among the joint tokens, and offsets
    [B + 1].
    """

    image_rows: torch.Tensor
    text_rows: torch.Tensor
    image_index: torch.Tensor
    text_index: torch.Tensor
    image_offsets: torch.Tensor
    text_offsets: torch.Tensor
    joint_offsets: torch.Tensor
    longest_image: int  # in these pairs, not in the whole side
    longest_text: int
    longest: int  # of both together

    def together(self, of_images: torch.Tensor, of_texts: torch.Tensor) -> torch.Tensor:
        """Return the rows of the pairs [N, ..] from those of the sides [n, ..]."""
        rows = of_images.new_empty(len(self.image_index) + len(self.text_index), of_images.shape[1])
        rows[self.image_index] = of_images[self.image_rows]
        rows[self.text_index] = of_texts[self.text_rows]
        return rows


def lay_out_pairs(
    images: Side, captions: Side, image_of: np.ndarray, caption_of: np.ndarray
) -> PairLayout:
    """Lay out pairs given by their indices into both sides [B]."""
    image_rows, image_lengths = images.rows(image_of)
    text_rows, text_lengths = captions.rows(caption_of)
    image_offsets = _offsets(image_lengths)
    text_offsets = _offsets(text_lengths)
    sent = send_indexes(
        [
            image_rows,
            text_rows,
            np.arange(len(image_rows)) + np.repeat(text_offsets[:-1], image_lengths),
            np.arange(len(text_rows)) + np.repeat(image_offsets[1:], text_lengths),
            image_offsets,
            text_offsets,
            image_offsets + text_offsets,
        ],
        images.hidden.device,
    )

    return PairLayout(
        *sent,
        longest_image=int(image_lengths.max()),
        longest_text=int(text_lengths.max()),
        longest=int((image_lengths + text_lengths).max()),
    )


class PairScorer:
    """Score pairs with a model in evaluation mode that has a matching head.

    It works on tensor-parallel slices too, if all ranks make the same calls. Raises UsageError for
    a model without that head.
    """

    def __init__(self, model: InterBert) -> None:
        if not hasattr(model, "itm_head"):
            raise UsageError("these weights have no matching head, which scoring pairs needs")
        self.model = model
        self.first = next(iter(model.interaction.layers), None)

    def images(self, batch: PackedBatch, device: torch.device) -> Side:
        """Prepare the images of a batch that is on the host; its texts are ignored."""
        hidden = self.model.image_embedding(send_batch(batch, device))
        return Side(hidden, self._project(hidden), batch.image_offsets.numpy().astype(np.int64))

    def captions(self, batch: PackedBatch, device: torch.device) -> Side:
        """Prepare the texts of a batch that is on the host."""
        sent = send_batch(batch, device)
        hidden = self.model.text_embedding(sent.token_ids, sent.token_positions, sent.token_types)
        return Side(hidden, self._project(hidden), batch.text_offsets.numpy().astype(np.int64))

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.first.attention.qkv(hidden) if self.first is not None else hidden[:, :0]

    def encode_side(self, side: Side, images: bool) -> torch.Tensor:
        """Return the pooled vector of each item of one side, without the other: [items, P]."""
        model = self.model
        (offsets,) = send_indexes([side.offsets], side.hidden.device)
        sequences = Sequences(offsets.int(), int(side.lengths.max()))
        hidden, _ = model.interaction(side.hidden, sequences)
        stack = model.image_stream if images else model.text_stream
        pooler = model.image_pooler if images else model.text_pooler
        return pooler(last_layer_of_first(stack, hidden, sequences))

    def margins(
        self, images: Side, captions: Side, image_of: np.ndarray, caption_of: np.ndarray
    ) -> torch.Tensor:
        """Return logit(matched) - logit(mismatched), float32 [B] on the device, of pairs given by
        their indices into both sides.
        """
        text, image = self.pooled(images, captions, image_of, caption_of)
        head = self.model.itm_head  # in float32: two logits rounded to 16 bits would often tie
        logits = F.linear(
            self.model.fuse(text.float(), image.float()), head.weight.float(), head.bias.float()
        )

        return logits[:, 0] - logits[:, 1]

    def pooled(
        self, images: Side, captions: Side, image_of: np.ndarray, caption_of: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pooled text and the pooled image of pairs, each [B, P]."""
        model = self.model
        pairs = lay_out_pairs(images, captions, image_of, caption_of)
        joint = pairs.together(images.hidden, captions.hidden)
        sequences = Sequences(pairs.joint_offsets.int(), pairs.longest)

        for number, layer in enumerate(model.interaction.in_order):
            qkv = (
                pairs.together(images.qkv, captions.qkv)
                if number == 0
                else layer.attention.qkv(joint)
            )
            joint, _ = layer.after_attention(layer.attention.attend(qkv, sequences), joint)

        images_here = Sequences(pairs.image_offsets.int(), pairs.longest_image)
        image = last_layer_of_first(model.image_stream, joint[pairs.image_index], images_here)
        texts_here = Sequences(pairs.text_offsets.int(), pairs.longest_text)
        text = last_layer_of_first(model.text_stream, joint[pairs.text_index], texts_here)

        return model.text_pooler(text), model.image_pooler(image)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def last_layer_of_first(
    stack: TransformerStack, x: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """Return the first tokens' states [B, H] after a stack over packed x [N, H]."""
    *before, last = stack.in_order or [None]
    for layer in before:
        x, _ = layer(x, sequences)

    first = x.index_select(0, sequences.offsets[:-1])
    if last is None:
        return first

    attended = _first_token_attention(last.attention, x, first, sequences)

    return last.after_attention(attended, first)[0]


def _first_token_attention(
    attention: SelfAttention, x: torch.Tensor, first: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """Return the attention output of each sequence's first token [B, H / ranks], over all tokens x
    [N, H].
    """
    size = attention.head_size
    weight = attention.qkv.weight.view(-1, 3, size, x.shape[1])
    bias = attention.qkv.bias.view(-1, 3, size)
    heads = len(weight)
    query = F.linear(first, weight[:, 0].reshape(-1, x.shape[1]), bias[:, 0].reshape(-1)).view(
        -1, heads, 1, size
    )

    rows, _slots, seen = sequences.once(padded_places, len(x))
    keyed = F.linear(x, weight[:, 1:].reshape(-1, x.shape[1]), bias[:, 1:].reshape(-1))
    padded = keyed.index_select(0, rows).view(len(first), sequences.longest, heads, 2, size)
    key, value = padded.permute(3, 0, 2, 1, 4)

    mask = seen[:, None, None, :]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attended.reshape(len(first), -1)
