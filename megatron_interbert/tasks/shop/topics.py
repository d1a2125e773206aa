"""Define topic-based recommendation, learned from clicks: the finetuning job, and the scores and
metrics of showings.
"""

from collections.abc import Callable

import numpy as np
import torch

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import TrainingStopped, local_errors
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.classification import ClassificationTask
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.shop.config import RecommendationConfig
from megatron_interbert.tasks.shop.figures import recommendation_metrics
from megatron_interbert.tasks.shop.scorer import ItemScorer, catalogue_of, catalogue_to_judge_by
from megatron_interbert.tasks.shop.topic_samples import (
    Clicks,
    ClickSet,
    Topics,
    read_clicks,
    read_topics,
)
from megatron_interbert.tasks.task import Job

FIGURES = ("AUC", "gAUC", "nDCG@5", "HR@5", "nDCG@10", "HR@10")


class ClickTask(ClassificationTask):
    """Compute two-class losses of the matching head: on pairs in one sequence, and on the same
    pairs with each side encoded alone.
    """

    KINDS = ("match", "alone")

    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(output.itm_logits.chunk(2), batch.labels.chunk(2), strict=True))

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        return torch.full((2,), len(batch.labels) // 2, dtype=torch.float64)


def recommendation_job(config: RecommendationConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --clicks of --topics over the items of --data-path.

    Unless --metric is given, the AUC on --valid-clicks decides which checkpoint is best.
    """
    stores = config.stores()
    corpus = open_stores(stores, config)
    tokenizer = vocabulary_of_run(config, stores)
    sizes = fitted_sizes(config, tokenizer, corpus)
    catalogue = catalogue_of(corpus, tokenizer, config)
    topics = read_topics(config.topics, "--topics")
    samples = ClickSet(
        topics, read_clicks(config.clicks, topics, catalogue, "--clicks"), catalogue, config
    )
    job = Job(
        ClickTask(),
        samples,
        sizes,
        ("itm",),
        describe_data(tokenizer, corpus, [config.topics, config.clicks], "recommendation"),
        tokenizer.vocab_file,
        metric=config.metric or "AUC",
        figures=FIGURES,
        patience=config.early_stopping,
    )

    if config.valid_clicks:
        valid_catalogue = catalogue_to_judge_by(config, catalogue)
        valid_topics = (
            read_topics(config.valid_topics, "--valid-topics") if config.valid_topics else topics
        )
        clicks = read_clicks(config.valid_clicks, valid_topics, valid_catalogue, "--valid-clicks")

        def evaluate(
            model: InterBert, state: ParallelState, device: torch.device
        ) -> dict[str, float]:
            return click_metrics(
                clicks,
                showing_scores(
                    ItemScorer(model, valid_catalogue, device), valid_topics, clicks, state
                ),
            )

        job.evaluate = evaluate

    return job


def showing_scores(
    scorer: ItemScorer,
    topics: Topics,
    clicks: Clicks,
    state: ParallelState,
    progress: Callable[[int], None] = lambda showings: None,
) -> np.ndarray:
    """Return the margins of all showings, float32 [n].

    Each rank scores a share; all return the same. Raises TrainingStopped if a score is not finite.
    """
    mine = np.arange(len(clicks.topics))[state.data_rank :: state.data_size]

    with local_errors():
        found = scorer.match(
            scorer.pieces(topics.texts), clicks.topics[mine], clicks.items[mine], progress
        )
        if not np.isfinite(found).all():
            raise TrainingStopped(
                "scores are not finite: the weights of this checkpoint have diverged; take an"
                " earlier one"
            )

    scores = np.empty(len(clicks.topics), np.float32)
    for rank, part in enumerate(state.gather(found)):
        scores[rank // state.tensor_size :: state.data_size] = part

    return scores


def click_metrics(clicks: Clicks, scores: np.ndarray) -> dict[str, float]:
    """Compute the metrics of all showings, grouped by topic; see `recommendation_metrics`."""
    order = np.argsort(clicks.topics, kind="stable")
    bounds = np.flatnonzero(np.diff(clicks.topics[order])) + 1
    groups = [(scores[rows], clicks.clicked[rows].astype(bool)) for rows in np.split(order, bounds)]
    return recommendation_metrics(groups)
