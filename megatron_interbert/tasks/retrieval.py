"""Image-text retrieval: scores of all pairs, ranks in both directions, recall.

A pair's score is the margin of the matching head, logit(matched) - logit(mismatched); probabilities would tie near 1.
Ties count against the model: an equal score ranks before the right answer.
"""

from collections.abc import Callable

import numpy as np
import torch

from megatron_interbert.data.packing import Example, normalised_locations, pack
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert


def image_examples(store: RegionStore, images: np.ndarray, max_regions: int) -> list[Example]:
    """The image side of a pair, for each image number."""
    examples = []
    for image in images:
        regions = store.read(int(image), max_regions)
        examples.append(
            Example(
                token_ids=np.zeros(0, np.int64),
                token_types=np.zeros(0, np.int64),
                features=regions.features,
                locations=normalised_locations(regions.boxes, regions.size),
            )
        )
    return examples


def caption_ids(store: RegionStore, captions: np.ndarray, tokenizer: CaptionTokenizer, max_tokens: int) -> list[np.ndarray]:
    """[CLS] words [SEP] of each caption."""
    return [
        np.concatenate([[tokenizer.cls], tokenizer.encode(store.caption(int(c)), max_tokens).ids, [tokenizer.sep]])
        for c in captions
    ]


@torch.no_grad()
def score_matrix(
    model: InterBert,
    images: list[Example],
    captions: list[np.ndarray],
    feature_dim: int,
    device: torch.device,
    pairs_per_batch: int = 512,
    progress: Callable[[int], None] = lambda pairs: None,
) -> np.ndarray:
    """float32 [captions, images] of margins over all pairs. Captions of like length share a batch."""
    scores = np.empty((len(captions), len(images)), dtype=np.float32)
    by_length = np.argsort([len(c) for c in captions], kind="stable")
    pairs = [(caption, image) for caption in by_length for image in range(len(images))]
    for start in range(0, len(pairs), pairs_per_batch):
        chunk = pairs[start : start + pairs_per_batch]
        examples = [
            Example(
                token_ids=captions[c],
                token_types=np.zeros(len(captions[c]), np.int64),
                features=images[i].features,
                locations=images[i].locations,
            )
            for c, i in chunk
        ]
        logits = model(pack(examples, feature_dim).to(device)).itm_logits
        margins = (logits[:, 0] - logits[:, 1]).cpu().numpy()
        rows, columns = zip(*chunk, strict=True)
        scores[list(rows), list(columns)] = margins
        progress(len(chunk))
    return scores


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank (1 is best) of the best right candidate for each query.

    scores [queries, candidates]; right [queries, candidates] bool, at least one per query. Equal wrong scores rank before.
    """
    if not np.isfinite(scores).all():
        raise UsageError("the model gives scores that are not finite, so nothing can be ranked; evaluate another checkpoint")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~right).sum(axis=1)


def recall_metrics(query_ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, median and mean rank."""
    values = {f"R@{k}": 100.0 * float((query_ranks <= k).mean()) for k in (1, 5, 10)}
    return {**values, "median_rank": float(np.median(query_ranks)), "mean_rank": float(query_ranks.mean())}


def retrieval_metrics(scores: np.ndarray, caption_image: np.ndarray) -> dict[str, dict[str, float]]:
    """Both directions from scores [captions, images] and the column of each caption's own image [captions]."""
    right = caption_image[:, None] == np.arange(scores.shape[1])[None]
    described = right.any(axis=0)
    return {
        "text_to_image": recall_metrics(ranks(scores, right)),
        "image_to_text": recall_metrics(ranks(scores.T[described], right.T[described])),
    }
