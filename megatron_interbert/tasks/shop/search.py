"""Define product search, queries to products as in MUGE and KDD Cup 2020: the finetuning job, and
search in full and in two stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_interbert.data.manifest import HARD_IMAGES
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import TrainingStopped, UsageError, local_errors
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.classification import ClassificationTask
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.shop.config import ProductSearchConfig
from megatron_interbert.tasks.shop.figures import order_of, search_metrics
from megatron_interbert.tasks.shop.scorer import ItemScorer, catalogue_of, catalogue_to_judge_by
from megatron_interbert.tasks.shop.search_samples import ProductSearchSet, Queries, read_queries
from megatron_interbert.tasks.task import Job

KEPT = 50  # products kept per query; metrics, files and pages need no more
FIGURES = ("R@1", "R@5", "R@10", "mean_recall", "nDCG@5")


class SearchTask(ClassificationTask):
    """Compute two losses of the matching head: whether each pair in one sequence matches, and, for
    sides encoded alone, which of several products a query is for.
    """

    KINDS = ("match", "alone")

    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        samples = len(batch.no_choice)
        judged, chosen = batch.labels.split([len(batch.labels) - samples, samples])
        full, alone = output.itm_logits.split([len(judged), batch.no_choice.numel()])
        margins = (alone[:, 0] - alone[:, 1]).view_as(batch.no_choice)
        return [(full, judged), (margins.masked_fill(batch.no_choice, float("-inf")), chosen)]

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        samples = len(batch.no_choice)
        return torch.tensor([len(batch.labels) - samples, samples], dtype=torch.float64)


def product_search_job(config: ProductSearchConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --queries over the products of --data-path.

    Unless --metric is given, the mean recall on --valid-queries decides which checkpoint is best.
    """
    stores = config.stores()
    corpus = open_stores(stores, config)
    tokenizer = vocabulary_of_run(config, stores)
    sizes = fitted_sizes(config, tokenizer, corpus)
    catalogue = catalogue_of(corpus, tokenizer, config)
    queries = read_queries(config.queries, catalogue, "--queries")
    samples = ProductSearchSet(queries, catalogue, config)
    near = [str(store.path / HARD_IMAGES) for store in corpus.stores if samples.near]
    job = Job(
        SearchTask(),
        samples,
        sizes,
        ("itm",),
        describe_data(tokenizer, corpus, [config.queries, *near], "product_search"),
        tokenizer.vocab_file,
        metric=config.metric or "mean_recall",
        figures=FIGURES,
        patience=config.early_stopping,
    )

    if config.valid_queries:
        valid_catalogue = catalogue_to_judge_by(config, catalogue)
        asked = read_queries(config.valid_queries, valid_catalogue, "--valid-queries")
        check_labelled(asked)

        def evaluate(
            model: InterBert, state: ParallelState, device: torch.device
        ) -> dict[str, float]:
            return search_metrics(
                search(ItemScorer(model, valid_catalogue, device), asked, state).found,
                asked.products,
            )

        job.evaluate = evaluate

    return job


def check_labelled(queries: Queries) -> None:
    """Raise UsageError unless every query names the products that it is for."""
    if not queries.labelled:
        missing = next(i for i, products in enumerate(queries.products) if not len(products))
        raise UsageError(
            f"{queries.path}: query {queries.ids[missing]} has no item_ids, which metrics need; add"
            " them to each query"
        )


@dataclass
class Search:
    """Hold the products found for each query (numbers, best first), their scores, and how many
    pairs were scored in full.
    """

    found: list[np.ndarray]
    scores: list[np.ndarray]
    pairs: int


def search(
    scorer: ItemScorer,
    queries: Queries,
    state: ParallelState,
    first_stage: int = 0,
    progress: Callable[[int], None] = lambda queries: None,
) -> Search:
    """Score all candidates of each query in full or, if `first_stage` > 0, only that many which the
    vectors rank first; keep the best KEPT.

    Each rank searches for a share of the queries; all return the same. Raises TrainingStopped if a
    score is not finite.
    """
    everything = np.arange(len(scorer.catalogue))
    mine = range(state.data_rank, len(queries), state.data_size)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    pairs = 0

    with local_errors():
        pieces = scorer.pieces([queries.texts[number] for number in mine])
        if first_stage:
            vectors = scorer.item_vectors(everything)
            wanted = scorer.text_vectors(pieces) if len(pieces) else None

        for row, number in enumerate(mine):
            candidates = (
                queries.candidates[number] if queries.candidates[number] is not None else everything
            )
            if first_stage:
                coarse = vectors[candidates] @ wanted[row]
                candidates = candidates[np.argsort(-coarse, kind="stable")[:first_stage]]

            scores = scorer.match([pieces[row]], np.zeros(len(candidates), np.int64), candidates)
            if not np.isfinite(scores).all():
                raise TrainingStopped(
                    "scores are not finite: the weights of this checkpoint have diverged; take an"
                    " earlier one"
                )

            order = order_of(scores, np.isin(candidates, queries.products[number]))
            pairs += len(candidates)
            rows.append((candidates[order][:KEPT], scores[order][:KEPT]))
            progress(1)

    return _joined(state.gather((rows, pairs)), len(queries), state)


def _joined(
    gathered: Sequence[tuple[Sequence[tuple[np.ndarray, np.ndarray]], int]],
    count: int,
    state: ParallelState,
) -> Search:
    """Merge the rows of all ranks, in the order of the queries."""
    none = np.zeros(0, np.int64), np.zeros(0, np.float32)
    rows = [none] * count
    for rank, (part, _) in enumerate(gathered):
        for place, row in enumerate(part):
            rows[rank // state.tensor_size + place * state.data_size] = row

    pairs = sum(pairs for _, pairs in gathered[:: state.tensor_size])

    return Search([found for found, _ in rows], [scores for _, scores in rows], pairs)
