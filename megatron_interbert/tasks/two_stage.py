"""Search in two stages: all images by a product of pooled vectors, then the best ones by the whole model.

The matching head is linear in the product of the two pooled vectors, so with each side encoded alone the margin of a pair is one
dot product: (w_matched - w_mismatched) * text . image. The model was not trained on sides alone, so this ranks worse; what is lost
is measured.
"""

import time

import numpy as np
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.model.pair_scorer import PairScorer, Side, last_layer_of_first
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pair_tiles import Pairs
from megatron_interbert.tasks.retrieval import check_finite, recall_metrics

AT_ONCE = 256


def alone(scorer: PairScorer, side: Side, images: bool) -> torch.Tensor:
    """Pooled vectors [items, P] of one side without the other."""
    model = scorer.model
    hidden = model.interaction(side.hidden, side.offsets.int(), side.longest)
    stack, pooler = (model.image_stream, model.image_pooler) if images else (model.text_stream, model.text_pooler)
    return pooler(last_layer_of_first(stack, hidden, side.offsets, side.longest))


@torch.no_grad()
def two_stage_search(
    scorer: PairScorer, pairs: Pairs, device: torch.device, state: ParallelState, keep: int, pairs_per_batch: int
) -> dict[str, float]:
    """Recall of captions to images when only the `keep` best images of the first stage are scored by the model, the recall of the
    first stage itself, and seconds; the same on all ranks."""
    if scorer.model.config.fusion != "product":
        raise UsageError("--two-stage: with a summed fusion the first stage gives every caption the same images; leave it out")
    started, keep = time.monotonic(), min(keep, len(pairs.images))
    weight = scorer.model.itm_head.weight.float()
    direction = weight[0] - weight[1]
    vectors = torch.cat(
        [alone(scorer, pairs.image_side(scorer, part, device), True).float() for part in _runs(np.arange(len(pairs.images)))]
    )
    check_finite(vectors.cpu().numpy())
    mine = np.arange(len(pairs.captions))[state.data_rank :: state.data_size]
    own = torch.from_numpy(pairs.own_image()).to(device)
    found = []
    for part in _runs(mine):
        side = pairs.caption_side(scorer, part, device)
        coarse = (alone(scorer, side, False).float() * direction) @ vectors.T  # [part, images]
        right = own[part]
        rank = (coarse >= coarse.gather(1, right[:, None])).sum(1)
        kept = coarse.topk(keep, dim=1).indices
        margins = _rescored(scorer, pairs, side, kept, device, pairs_per_batch)
        check_finite(torch.cat([coarse, margins], dim=1).cpu().numpy())
        inside = kept == right[:, None]
        mine_score = torch.where(inside, margins, -torch.inf).amax(1, keepdim=True)
        fine = 1 + ((margins >= mine_score) & ~inside).sum(1)
        found.append(torch.stack([torch.where(inside.any(1), fine, rank.clamp(min=keep + 1)), inside.any(1)]).cpu())
    mine_found = torch.cat([torch.zeros(2, 0, dtype=torch.long), *found], dim=1).numpy()
    ranks, inside = np.concatenate(state.gather(mine_found)[:: state.tensor_size], axis=1)
    return {**recall_metrics(ranks), f"first_stage_R@{keep}": 100.0 * float(inside.mean()), "seconds": time.monotonic() - started}


def _rescored(
    scorer: PairScorer, pairs: Pairs, captions: Side, kept: torch.Tensor, device: torch.device, pairs_per_batch: int
) -> torch.Tensor:
    """Margins [captions, keep] of the kept images of each caption."""
    numbers, place = torch.unique(kept, return_inverse=True)
    margins = torch.empty(kept.numel(), device=device)
    caption_of = torch.arange(len(kept), device=device).repeat_interleave(kept.shape[1])
    place = place.flatten()
    for part in _runs(np.arange(len(numbers))):
        images = pairs.image_side(scorer, numbers[torch.from_numpy(part).to(device)].cpu().numpy(), device)
        here = torch.nonzero((place >= int(part[0])) & (place <= int(part[-1])))[:, 0]
        for rows in here.split(pairs_per_batch):
            margins[rows] = scorer.margins(images, captions, place[rows] - int(part[0]), caption_of[rows])
    return margins.view_as(kept)


def _runs(items: np.ndarray) -> list[np.ndarray]:
    return [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]
