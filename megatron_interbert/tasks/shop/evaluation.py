"""Run `evaluate product_search` and `evaluate recommendation`: metrics, page, submission files."""

import json
from typing import Any

import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.loading import (
    agree_on_inputs,
    as_trained,
    check_photos,
    load_model,
    open_for,
)
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.results import result_of, table, write_result
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.config import (
    EvaluateProductSearchConfig,
    EvaluateRecommendationConfig,
    ScoreTopicsConfig,
)
from megatron_interbert.tasks.shop.figures import search_metrics
from megatron_interbert.tasks.shop.page import search_page
from megatron_interbert.tasks.shop.scorer import ItemScorer, catalogue_of
from megatron_interbert.tasks.shop.search import Search, check_labelled, search
from megatron_interbert.tasks.shop.search_samples import Queries, read_queries
from megatron_interbert.tasks.shop.topic_samples import read_clicks, read_topics
from megatron_interbert.tasks.shop.topics import click_metrics, showing_scores
from megatron_interbert.weights.sources import WeightSource


def open_items(
    config: EvaluateProductSearchConfig | EvaluateRecommendationConfig | ScoreTopicsConfig,
    state: ParallelState,
    device: torch.device,
    files: list[str],
) -> tuple[ItemScorer, WeightSource, Corpus, Any]:
    """Open what an evaluation over items needs: (scorer over the items of --data-path, source of
    its weights, corpus of the stores, folder for results).
    """
    model, source = load_model(
        config.load, ("itm",), config.kernels, device, state, config.averaged, config.precision
    )
    as_trained(config, source)
    corpus, tokenizer = open_for(config, source, [config.data_path])
    fit_length(config, source.config)
    folder = agree_on_inputs(
        config, state, source, tokenizer, [f"{config.data_path}/{MANIFEST}", *filter(None, files)]
    )

    return (
        ItemScorer(model, catalogue_of(corpus, tokenizer, config), device),
        source,
        corpus,
        folder,
    )


def evaluate_product_search(
    config: EvaluateProductSearchConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, a submission file, and return the
    result.

    All ranks of a launch must call it.
    """
    check_photos(config.image_folder, state)
    scorer, source, corpus, folder = open_items(config, state, device, [config.queries])
    queries = read_queries(config.queries, scorer.catalogue, "--queries")
    if not config.submission:
        check_labelled(queries)

    metrics: dict[str, float] = {}
    runs = {"": 0} if config.exhaustive else {}
    if config.two_stage:
        runs["two_stage_"] = config.two_stage
    for prefix, first_stage in runs.items():
        found = search_all(scorer, queries, state, first_stage, prefix or "searching")
        if queries.labelled:
            figures = search_metrics(found.found, queries.products)
            metrics |= {f"{prefix}{name}": value for name, value in figures.items()}

        if not prefix or not config.exhaustive:
            best = found
        else:
            metrics["two_stage_recall@10"] = shared_share(best, found)

    result = result_of(
        config,
        "finetuned" if source.facts.get("task") else "zero-shot",
        metrics,
        source,
        corpus,
        [config.queries],
        queries=len(queries),
        products=len(scorer.catalogue),
    )
    if state.is_main:
        write_result(folder, result)
        photos = photos_in(config.image_folder)
        write_text(
            folder / "result.html", search_page(result, queries, best, scorer.catalogue, photos)
        )

        if config.submission:
            name, text = submission(config.submission, queries, best, scorer.catalogue)
            write_text(folder / name, text)
            print(f"submission: {folder / name}")

        print(table(result) if metrics else "the queries have no item_ids: no metrics computed")
        print(f"result: {folder / 'result.json'}\npage:   {folder / 'result.html'}")

    return result


def search_all(
    scorer: ItemScorer, queries: Queries, state: ParallelState, first_stage: int, title: str
) -> Search:
    """Search for all queries with a progress bar; see `search`."""
    with progress(total=len(queries), unit="query", desc=title, shown=state.is_main) as bar:
        return search(
            scorer,
            queries,
            state,
            first_stage,
            lambda count: bar.update(count * state.data_size),
        )


def shared_share(full: Search, staged: Search) -> float:
    """Return the percentage of the full search's ten best products that the two-stage search has
    among its own ten.
    """
    shared = [
        len(set(a[:10]) & set(b[:10])) / min(10, len(a))
        for a, b in zip(full.found, staged.found, strict=True)
    ]
    return 100.0 * sum(shared) / len(shared)


def submission(kind: str, queries: Queries, found: Search, catalogue: Catalogue) -> tuple[str, str]:
    """Return (name, text) of a benchmark's submission file: ten products per query as JSON Lines
    (MUGE), or five as CSV (KDD Cup 2020).

    Raises UsageError if a query has fewer candidates.
    """
    ids = catalogue.ids
    most = 10 if kind == "muge" else 5
    if short := next((i for i, items in enumerate(found.found) if len(items) < most), None):
        raise UsageError(
            f"--submission {kind} needs {most} products for each query, but query"
            f" {queries.ids[short]} has fewer candidates"
        )

    lists = [[ids[item] for item in items[:most]] for items in found.found]
    if kind == "muge":
        lines = [
            json.dumps(
                {
                    "query_id": number(query),
                    "query_text": text,
                    "item_ids": [number(item) for item in items],
                },
                ensure_ascii=False,
            )
            for query, text, items in zip(queries.ids, queries.texts, lists, strict=True)
        ]
        return "submission.jsonl", "\n".join(lines) + "\n"

    lines = [",".join([query, *items]) for query, items in zip(queries.ids, lists, strict=True)]

    return (
        "submission.csv",
        "\n".join(["query-id,product1,product2,product3,product4,product5", *lines]) + "\n",
    )


def number(text: str) -> int | str:
    """Return an id as the benchmark's files write it: as a number if it is one."""
    return int(text) if text.isdecimal() else text


def evaluate_recommendation(
    config: EvaluateRecommendationConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json and return the result; all ranks of a launch must call it."""
    scorer, source, corpus, folder = open_items(
        config, state, device, [config.topics, config.clicks]
    )
    topics = read_topics(config.topics, "--topics")
    clicks = read_clicks(config.clicks, topics, scorer.catalogue, "--clicks")

    with progress(
        total=len(clicks.topics), unit="pair", desc="scoring", shown=state.is_main
    ) as bar:
        scores = showing_scores(
            scorer, topics, clicks, state, lambda count: bar.update(count * state.data_size)
        )

    result = result_of(
        config,
        "finetuned" if source.facts.get("task") else "zero-shot",
        click_metrics(clicks, scores),
        source,
        corpus,
        [config.topics, config.clicks],
        topics=len(topics),
        showings=len(clicks.topics),
    )
    if state.is_main:
        write_result(folder, result)
        print(table(result))
        print(f"result: {folder / 'result.json'}")

    return result
