"""Align the words and regions of each sample by optimal transport (word-region alignment, UNITER,
arXiv 1909.11740).

The plan is found by the inexact proximal point method (IPOT, arXiv 1802.04307). Samples are ragged:
they are laid out as a block [B, words, regions] in which places beyond a sample's own have no mass,
so no plan couples two samples.
"""

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch

STEP = 0.5  # beta, the weight of staying near the last plan
ITERATIONS = 50
LEAST = 1e-30  # below which masses are not divided


def alignment_distances(
    text: torch.Tensor, image: torch.Tensor, batch: PackedBatch
) -> torch.Tensor:
    """Return, for each sample [B], what it costs to move its words, [CLS] and [SEP] included, to
    its regions, [IMG] excluded: the sum of plan times cost 1 - cosine, in float32.

    `text` [Nt, H] and `image` [Ni, H] are the states of all tokens. Gradients pass through the
    costs, not through the plan. A sample without an image has distance 0.
    """
    every_word = torch.arange(len(text), device=text.device)
    words, has_word = as_block(text, every_word, batch.text_offsets, 0, batch.max_text)
    most = max(batch.max_image - 1, 1)
    regions, has_region = as_block(image, batch.region_rows, batch.image_offsets, 1, most)

    cost = 1.0 - words @ regions.transpose(1, 2)
    plan = transport_plan(cost.detach(), has_word, has_region)

    return (cost * plan).sum(dim=(1, 2))


def as_block(
    states: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, first: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some rows of states [n, H], scaled to length 1, as a block of the samples that
    `offsets` [B + 1] divide, float32 [B, most, H], and which places are taken, bool [B, most].

    The rows of a sample begin `first` rows after its offset.
    """
    owner = torch.bucketize(rows, offsets[1:].long(), right=True)
    place = rows - offsets.long()[owner] - first
    samples = len(offsets) - 1
    unit = F.normalize(states.index_select(0, rows).float(), dim=1)

    values = unit.new_zeros(samples, most, unit.shape[1]).index_put((owner, place), unit)
    taken = torch.zeros(samples, most, dtype=torch.bool, device=states.device)
    taken[owner, place] = True

    return values, taken


def transport_plan(
    cost: torch.Tensor, has_word: torch.Tensor, has_region: torch.Tensor
) -> torch.Tensor:
    """Return the plan [B, words, regions] that moves equal masses of a sample's words to equal
    masses of its regions at nearly the least cost [B, words, regions].
    """
    of_word = has_word / has_word.sum(dim=1, keepdim=True).clamp(min=1)
    of_region = has_region / has_region.sum(dim=1, keepdim=True).clamp(min=1)
    plan = (has_word[:, :, None] & has_region[:, None, :]).to(cost)
    nearness = torch.exp(-cost / STEP)
    left = of_word

    for _ in range(ITERATIONS):  # regions first, as UNITER
        kernel = nearness * plan
        right = of_region / torch.einsum("blr,bl->br", kernel, left).clamp(min=LEAST)
        left = of_word / torch.einsum("blr,br->bl", kernel, right).clamp(min=LEAST)
        plan = left[:, :, None] * kernel * right[:, None, :]

    return plan
