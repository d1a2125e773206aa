"""Define caption-based image retrieval: the finetuning job, scores of all pairs, and recall in both
directions.

A pair's score is the margin of the matching head, logit(matched) - logit(mismatched), because
probabilities would tie near 1. Ties count against the model: a wrong candidate with an equal score
ranks before the right one.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_IMAGES
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.pretraining import trainable_captions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.classification import ClassificationTask
from megatron_interbert.tasks.image_finder import shown_ids
from megatron_interbert.tasks.overlaps import rows_without
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.retrieval.config import RetrievalConfig
from megatron_interbert.tasks.retrieval.pairs import Pairs, score_block
from megatron_interbert.tasks.retrieval.samples import RetrievalSet
from megatron_interbert.tasks.task import Evaluate, Job

CAPTIONS_AT_ONCE = 512
Tile = tuple[slice, slice, np.ndarray]


class RetrievalTask(ClassificationTask):
    """Compute the two-class loss of the matching head on every pair."""

    KINDS = ("match",)

    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(output.itm_logits, batch.mismatched)]

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        return torch.tensor([len(batch)], dtype=torch.float64)


def retrieval_job(config: RetrievalConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on the region stores of --data-path.

    Unless --metric is given, text-to-image R@1 over all pairs of --valid-data-path decides which
    checkpoint is best.
    """
    stores = config.stores()
    corpus = open_stores(stores, config)
    tokenizer = vocabulary_of_run(config, stores)
    sizes = fitted_sizes(config, tokenizer, corpus)
    samples = RetrievalSet(corpus, tokenizer, config)

    if state.is_main and not samples.has_hard_images:
        print(
            f"{corpus.path}: no hard_images.npy, so hard captions are drawn at random; make it with"
            " interbert mine-neighbours",
            flush=True,
        )

    near = [str(store.path / HARD_IMAGES) for store in corpus.stores if samples.has_hard_images]
    data = describe_data(tokenizer, corpus, near, "retrieval")
    job = Job(
        RetrievalTask(),
        samples,
        sizes,
        ("itm",),
        data,
        tokenizer.vocab_file,
        metric=config.metric or "t2i_R@1",
        figures=tuple(f"{direction}_R@{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10)),
        patience=config.early_stopping,
    )

    job.leave_out = partial(leave_out, job)
    if config.valid_data_path:
        pairs = valid_pairs(config, corpus, tokenizer)
        job.judged_images = frozenset(shown_ids(pairs.corpus, pairs.images))
        job.evaluate = evaluation_of(config, pairs)

    return job


def leave_out(job: Job, names: Collection[str]) -> list[str]:
    """Take the captions of images with some names out of a job's training samples; return their
    numbers.
    """
    samples: RetrievalSet = job.samples
    corpus = samples.corpus
    captions = samples.samples
    ids = shown_ids(corpus, corpus.caption_image[captions])
    kept = captions[rows_without(names, [(image,) for image in ids], corpus.path)]
    lost = np.setdiff1d(captions, kept)
    if len(lost):
        job.samples = RetrievalSet(corpus, samples.tokenizer, samples.config, kept)

    return list(map(str, lost))


def valid_pairs(config: RetrievalConfig, corpus: Corpus, tokenizer: CaptionTokenizer) -> Pairs:
    """Return the captions and images of --valid-data-path, to be scored."""
    valid = open_stores([config.valid_data_path], config)
    corpus.check_alike(valid.stores[0], config.allow_other_detector, "--valid-data-path")

    return choose_pairs(
        valid,
        tokenizer,
        config.language,
        config.valid_images,
        config.max_regions,
        config.max_tokens,
    )


def evaluation_of(config: RetrievalConfig, pairs: Pairs) -> Evaluate:
    """Return a function that evaluates a model on all pairs of captions and images."""

    def evaluate(model: InterBert, state: ParallelState, device: torch.device) -> dict[str, float]:
        batch = 4 * config.eval_batch_size
        scores = score_matrix(PairScorer(model), pairs, device, batch, state)
        return flat_metrics(retrieval_metrics(scores, pairs.own_image()))

    return evaluate


def choose_pairs(
    corpus: Corpus,
    tokenizer: CaptionTokenizer,
    language: str,
    max_images: int,
    max_regions: int,
    max_tokens: int,
    only: np.ndarray | None = None,
) -> Pairs:
    """Return the captions to evaluate, and their images.

    `language`, `max_images` and `only` restrict them to one language, to the first images and to
    images of these numbers; empty, 0 and None take all. Raises UsageError if no caption is left.
    """
    captions = trainable_captions(corpus, language)
    if max_images:
        captions = captions[corpus.caption_image[captions] < max_images]
    if only is not None:
        captions = captions[np.isin(corpus.caption_image[captions], only)]
    if not len(captions):
        raise UsageError(
            f"{corpus.path}: no captions to evaluate on; build the store with --captions"
        )

    return Pairs(
        corpus,
        tokenizer,
        captions,
        np.unique(corpus.caption_image[captions]),
        max_regions,
        max_tokens,
    )


@torch.no_grad()
def score_matrix(
    scorer: PairScorer,
    pairs: Pairs,
    device: torch.device,
    pairs_per_batch: int = 512,
    state: ParallelState | None = None,
    images_at_once: int = 256,
) -> np.ndarray:
    """Return the margins of all pairs, float32 [captions, images], in memory.

    Each rank scores a share; all return the same.
    """
    state = state or ParallelState()
    mine = pairs.by_length()[state.data_rank :: state.data_size]
    scores = np.full((len(pairs.captions), len(pairs.images)), -np.inf, dtype=np.float32)
    order = pairs.by_regions()

    with local_errors():
        for start in range(0, len(order), images_at_once):
            part = order[start : start + images_at_once]
            images = pairs.image_side(scorer, part, device)

            for top in range(0, len(mine), CAPTIONS_AT_ONCE):
                rows = mine[top : top + CAPTIONS_AT_ONCE]
                block = score_block(
                    scorer, images, pairs.caption_side(scorer, rows, device), pairs_per_batch
                )
                scores[np.ix_(rows, part)] = block.cpu().numpy()

    for rank, rows in enumerate(state.gather(scores[mine])):
        place = rank // state.tensor_size
        scores[pairs.by_length()[place :: state.data_size]] = rows

    return scores


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the rank (1 is best) of the best right candidate for each query.

    `scores` and `right` (bool) are [queries, candidates]; each query has at least one right
    candidate. Wrong candidates with an equal score rank before it.
    """
    check_finite(scores)
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)

    return 1 + ((scores >= best) & ~right).sum(axis=1)


def check_finite(scores: np.ndarray) -> None:
    """Raise UsageError for scores with NaN or infinity, which cannot be ranked."""
    if not np.isfinite(scores).all():
        raise UsageError(
            "the model gives scores that are not finite, so nothing can be ranked; evaluate another"
            " checkpoint"
        )


def ranks_of_tiles(
    read: Callable[[], Iterable[Tile]], own: np.ndarray, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of the captions' own images [C] and of the images' best own captions [I], as
    `ranks` would on the whole matrix.

    `read` yields all tiles, and is called twice, so that only one tile is in memory. `own` [C] is
    the column of each row's own image; every image must have a caption.
    """
    of_caption = np.full(len(own), -np.inf, np.float32)
    of_image = np.full(images, -np.inf, np.float32)

    for rows, columns, scores in read():
        check_finite(scores)
        row, column = np.nonzero(own[rows][:, None] == np.arange(columns.start, columns.stop))
        of_caption[rows.start + row] = scores[row, column]
        np.maximum.at(of_image, columns.start + column, scores[row, column])

    caption_ranks = np.ones(len(own), np.int64)
    image_ranks = np.ones(images, np.int64)

    for rows, columns, scores in read():
        wrong = own[rows][:, None] != np.arange(columns.start, columns.stop)
        caption_ranks[rows] += (wrong & (scores >= of_caption[rows, None])).sum(axis=1)
        image_ranks[columns] += (wrong & (scores >= of_image[columns])).sum(axis=0)

    return caption_ranks, image_ranks


def recall_metrics(query_ranks: np.ndarray) -> dict[str, float]:
    """Return R@1, R@5 and R@10 in percent, and the median and mean rank."""
    values = {f"R@{k}": 100.0 * float((query_ranks <= k).mean()) for k in (1, 5, 10)}
    return {
        **values,
        "median_rank": float(np.median(query_ranks)),
        "mean_rank": float(query_ranks.mean()),
    }


def retrieval_metrics(scores: np.ndarray, caption_image: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute the metrics of both directions from scores [captions, images].

    `caption_image` [captions] is the column of each caption's own image.
    """
    right = caption_image[:, None] == np.arange(scores.shape[1])[None]
    described = right.any(axis=0)

    return {
        "text_to_image": recall_metrics(ranks(scores, right)),
        "image_to_text": recall_metrics(ranks(scores.T[described], right.T[described])),
    }


def flat_metrics(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the metrics of both directions in one dictionary (t2i_R@1, ..), without mean ranks."""
    short = {"text_to_image": "t2i", "image_to_text": "i2t"}
    return {
        f"{short[d]}_{name}": value
        for d, m in metrics.items()
        for name, value in m.items()
        if name != "mean_rank"
    }
