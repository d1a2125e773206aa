"""Scores of all pairs of some images and some captions, exactly those of the model, with little done twice.

Done once for each image and caption, because it does not depend on the partner: both embeddings and, token by token, the first
layer's queries, keys and values. Done once for each pair, only as far as the matching head can see it: the last layer of each
stream computes keys and values of all its tokens, and everything else for its first token, which alone is pooled. Word and region
heads are not run at all. What a token attends to is the same as in `InterBert.forward`, so the scores are equal to rounding.

Legend: n tokens of one side, N of all pairs, H hidden, B pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.transformer import SelfAttention, TransformerStack


@dataclass
class Side:
    """Images or captions made ready: hidden states [n, H], first layer's projection [n, 3 H / ranks], offsets [items + 1]."""

    hidden: torch.Tensor
    qkv: torch.Tensor
    offsets: torch.Tensor
    longest: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(token rows, end to end, of some items [B]; their lengths [B])."""
        starts, lengths = self.offsets[items], self.offsets[items + 1] - self.offsets[items]
        ends = lengths.cumsum(0)
        return torch.arange(int(ends[-1]), device=ends.device) + torch.repeat_interleave(
            starts - (ends - lengths), lengths
        ), lengths


class PairScorer:
    """For a model in evaluation mode with a matching head; works on tensor-parallel slices too (all ranks call alike)."""

    def __init__(self, model: InterBert) -> None:
        if not hasattr(model, "itm_head"):
            raise UsageError("these weights have no matching head, so pairs cannot be scored")
        self.model = model
        self.first = next((layer for layer in model.interaction.layers), None)

    def images(self, batch: PackedBatch) -> Side:
        """The images of a batch; its texts are not looked at."""
        hidden = self.model.image_embedding(batch)
        return Side(hidden, self._project(hidden), batch.image_offsets.long(), batch.max_image)

    def captions(self, batch: PackedBatch) -> Side:
        """The texts of a batch."""
        hidden = self.model.text_embedding(batch.token_ids, batch.token_positions, batch.token_types)
        return Side(hidden, self._project(hidden), batch.text_offsets.long(), batch.max_text)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.first.attention.qkv(hidden) if self.first is not None else hidden[:, :0]

    def margins(self, images: Side, captions: Side, image_of: torch.Tensor, caption_of: torch.Tensor) -> torch.Tensor:
        """float32 [B]: logit(matched) - logit(mismatched) of pairs given by their numbers in both sides."""
        pooled = self.pooled(images, captions, image_of, caption_of)
        head = self.model.itm_head  # in float32: two logits rounded to 16 bits would often tie
        logits = F.linear(self.model.fuse(*pooled).float(), head.weight.float(), head.bias.float())
        return logits[:, 0] - logits[:, 1]

    def pooled(
        self, images: Side, captions: Side, image_of: torch.Tensor, caption_of: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled text and image [B, P] of pairs."""
        model = self.model
        image_rows, image_lengths = images.rows(image_of)
        text_rows, text_lengths = captions.rows(caption_of)
        image_offsets, text_offsets = _offsets(image_lengths), _offsets(text_lengths)
        joint_offsets = image_offsets + text_offsets
        # Where the tokens of each kind stand among those of their pair: image tokens first.
        image_index = torch.arange(len(image_rows), device=image_rows.device) + torch.repeat_interleave(
            text_offsets[:-1], image_lengths
        )
        text_index = torch.arange(len(text_rows), device=text_rows.device) + torch.repeat_interleave(
            image_offsets[1:], text_lengths
        )

        def together(of_images: torch.Tensor, of_texts: torch.Tensor) -> torch.Tensor:
            rows = of_images.new_empty(len(image_index) + len(text_index), of_images.shape[1])
            rows[image_index], rows[text_index] = of_images[image_rows], of_texts[text_rows]
            return rows

        joint = together(images.hidden, captions.hidden)
        longest_image, longest_text = int(image_lengths.max()), int(text_lengths.max())  # of these pairs, not of all
        longest = int((image_lengths + text_lengths).max())
        for number, layer in enumerate(model.interaction.layers):
            qkv = together(images.qkv, captions.qkv) if number == 0 else layer.attention.qkv(joint)
            joint = layer.after_attention(layer.attention.attend(qkv, joint_offsets.int(), longest), joint)
        image = last_layer_of_first(model.image_stream, joint[image_index], image_offsets, longest_image)
        text = last_layer_of_first(model.text_stream, joint[text_index], text_offsets, longest_text)
        return model.text_pooler(text), model.image_pooler(image)


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def last_layer_of_first(stack: TransformerStack, x: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    """The first token's state [B, H] behind a stack over packed x [N, H]."""
    *before, last = stack.layers or [None]
    for layer in before:
        x = layer(x, offsets.int(), longest)
    first = x[offsets[:-1]]
    if last is None:
        return first
    return last.after_attention(_first_token_attention(last.attention, x, first, offsets, longest), first)


def _first_token_attention(
    attention: SelfAttention, x: torch.Tensor, first: torch.Tensor, offsets: torch.Tensor, longest: int
) -> torch.Tensor:
    """What the first token of each sequence attends to [B, H / ranks], from all tokens x [N, H]."""
    size = attention.head_size
    weight, bias = attention.qkv.weight.view(-1, 3, size, x.shape[1]), attention.qkv.bias.view(-1, 3, size)
    heads = len(weight)
    query = F.linear(first, weight[:, 0].reshape(-1, x.shape[1]), bias[:, 0].reshape(-1)).view(-1, heads, 1, size)
    rows = torch.minimum(offsets[:-1, None] + torch.arange(longest, device=x.device), offsets[1:, None] - 1)  # [B, longest]
    real = torch.arange(longest, device=x.device) < (offsets[1:] - offsets[:-1])[:, None]
    keyed = F.linear(x, weight[:, 1:].reshape(-1, x.shape[1]), bias[:, 1:].reshape(-1))[rows]
    key, value = keyed.view(len(first), longest, heads, 2, size).permute(3, 0, 2, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :]).reshape(len(first), -1)
