"""Search in two stages: rank all images by dot products of pooled vectors, then the best of them by
the whole model.

The matching head is linear in the product of the two pooled vectors, so if each side is encoded
alone the margin of a pair is, up to a constant, a dot product: (w_matched - w_mismatched) * text .
image. The model was not trained on sides alone, so this ranks worse; how much is measured.
"""

import time

import numpy as np
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.model.pair_scorer import PairScorer, Side
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.retrieval.job import check_finite, recall_metrics
from megatron_interbert.tasks.retrieval.pairs import Pairs

AT_ONCE = 256


@torch.no_grad()
def two_stage_search(
    scorer: PairScorer,
    pairs: Pairs,
    device: torch.device,
    state: ParallelState,
    keep: int,
    pairs_per_batch: int,
) -> dict[str, float]:
    """Search for each caption's image, scoring only the `keep` best images of the first stage with
    the model.

    Return, the same on all ranks, the recall of both stages together, the percentage of own images
    among those kept by the first stage, and the seconds taken. Raises UsageError for a model with
    summed fusion.
    """
    if scorer.model.config.fusion != "product":
        raise UsageError(
            "--two-stage: in a model with summed fusion the first stage gives every caption the"
            " same images; leave the flag out"
        )

    started = time.monotonic()
    keep = min(keep, len(pairs.images))
    weight = scorer.model.itm_head.weight.float()
    direction = weight[0] - weight[1]
    vectors = image_vectors(scorer, pairs, device)
    mine = np.arange(len(pairs.captions))[state.data_rank :: state.data_size]
    own = torch.from_numpy(pairs.own_image())
    found = []

    for part in _runs(mine):
        side = pairs.caption_side(scorer, part, device)
        texts = scorer.encode_side(side, images=False).float()
        scores = (texts * direction) @ vectors.T  # [part, images]
        best = scores.topk(keep, dim=1).indices
        coarse = scores.cpu()
        kept = best.cpu()
        margins = _rescored(scorer, pairs, side, kept.numpy(), device, pairs_per_batch)
        check_finite(torch.cat([coarse, margins], dim=1).numpy())
        found.append(_ranks(coarse, kept, margins, own[part]))

    mine_found = torch.cat([torch.zeros(2, 0, dtype=torch.long), *found], dim=1).numpy()
    ranks, inside = np.concatenate(state.gather(mine_found)[:: state.tensor_size], axis=1)

    return {
        **recall_metrics(ranks),
        f"first_stage_R@{keep}": 100.0 * float(inside.mean()),
        "seconds": time.monotonic() - started,
    }


def image_vectors(scorer: PairScorer, pairs: Pairs, device: torch.device) -> torch.Tensor:
    """Encode all images alone: float32 [I, P]. Raises UsageError if a vector is not finite."""
    vectors = []
    for part in _runs(np.arange(len(pairs.images))):
        side = pairs.image_side(scorer, part, device)
        vectors.append(scorer.encode_side(side, images=True).float())
    found = torch.cat(vectors)
    check_finite(found.cpu().numpy())
    return found


def _ranks(
    coarse: torch.Tensor, kept: torch.Tensor, margins: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Return the rank of each caption's own image, and whether it was kept, int64 [2, captions].

    Computed from the scores of the first stage `coarse` [captions, images], the images that are
    `kept` and their `margins` [captions, keep], and the own image `right` [captions]. One that was
    not kept ranks as in the first stage, and after all that were.
    """
    rank = (coarse >= coarse.gather(1, right[:, None])).sum(1)
    inside = kept == right[:, None]
    own_margin = torch.where(inside, margins, -torch.inf).amax(1, keepdim=True)
    fine = 1 + ((margins >= own_margin) & ~inside).sum(1)
    behind = rank.clamp(min=kept.shape[1] + 1)

    return torch.stack([torch.where(inside.any(1), fine, behind), inside.any(1)])


def _rescored(
    scorer: PairScorer,
    pairs: Pairs,
    captions: Side,
    kept: np.ndarray,
    device: torch.device,
    pairs_per_batch: int,
) -> torch.Tensor:
    """Return the margins of the kept images of each caption, [captions, keep], on the host."""
    numbers, place = np.unique(kept.ravel(), return_inverse=True)
    caption_of = np.repeat(np.arange(len(kept)), kept.shape[1])
    order = []
    found = []

    for part in _runs(np.arange(len(numbers))):
        images = pairs.image_side(scorer, numbers[part], device)
        here = np.flatnonzero((place >= part[0]) & (place <= part[-1]))
        for rows in _runs(here, pairs_per_batch):
            order.append(rows)
            found.append(scorer.margins(images, captions, place[rows] - part[0], caption_of[rows]))

    margins = torch.empty(kept.size)
    margins[np.concatenate(order)] = torch.cat(found).cpu()

    return margins.view(kept.shape)


def _runs(items: np.ndarray, most: int = AT_ONCE) -> list[np.ndarray]:
    return [items[start : start + most] for start in range(0, len(items), most)]
