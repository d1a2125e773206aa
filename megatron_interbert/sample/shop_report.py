"""Compute figures of models in the generated shop, for search by what a query needs, and compare
them with TF-IDF of titles and with chance.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.machines.processes import aligned
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.sample.shop_world import COLOURS, KINDS, PLACES, Topic
from megatron_interbert.tasks.loading import as_trained, load_model, open_for
from megatron_interbert.tasks.records import read_records
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.config import EvaluateProductSearchConfig
from megatron_interbert.tasks.shop.figures import search_metrics
from megatron_interbert.tasks.shop.scorer import ItemScorer, catalogue_of
from megatron_interbert.tasks.shop.search import search
from megatron_interbert.tasks.shop.search_samples import read_queries
from megatron_interbert.tasks.shop.topic_samples import Clicks, read_clicks, read_topics
from megatron_interbert.tasks.shop.topics import click_metrics, showing_scores

Figures = dict[str, list[dict[str, float]]]  # way of ranking -> figures of each run


class TitleIndex:
    """Rank titles by TF-IDF of characters and pairs of characters."""

    def __init__(self, titles: Sequence[str]) -> None:
        counts = [self.grams(title) for title in titles]
        found = Counter(gram for count in counts for gram in count)
        self.weight = {gram: np.log(len(titles) / number) for gram, number in found.items()}
        self.titles = [self.vector(count) for count in counts]

    @staticmethod
    def grams(text: str) -> Counter[str]:
        """Count the characters and pairs of characters in a text."""
        text = text.lower()
        return Counter(
            text[at : at + size] for size in (1, 2) for at in range(len(text) - size + 1)
        )

    def vector(self, counts: Counter[str]) -> dict[str, float]:
        """Return the TF-IDF vector of such counts, normalised to length 1."""
        raw = {
            gram: number * self.weight[gram]
            for gram, number in counts.items()
            if gram in self.weight
        }
        length = sum(value * value for value in raw.values()) ** 0.5 or 1.0

        return {gram: value / length for gram, value in raw.items()}

    def scores(self, text: str) -> np.ndarray:
        """Return the cosines of a text with all titles, [titles]."""
        wanted = self.vector(self.grams(text))
        return np.array(
            [
                sum(value * title.get(gram, 0.0) for gram, value in wanted.items())
                for title in self.titles
            ]
        )


def open_run(load: str, data_path: str) -> ItemScorer:
    """Load a run's model for scoring the shop's products, with the settings of its training."""
    device = this_device()
    config = EvaluateProductSearchConfig(load=load, data_path=data_path)
    model, source = load_model(load, ("itm",), "auto", device)
    as_trained(config, source)
    corpus, tokenizer = open_for(config, source, [data_path])

    return ItemScorer(model, catalogue_of(corpus, tokenizer, config), device)


def index_titles(catalogue: Catalogue) -> TitleIndex:
    """Build an index of the titles of all products, even for a model that does not read titles."""
    read = Catalogue(
        catalogue.corpus, catalogue.tokenizer, True, catalogue.max_tokens, catalogue.max_regions
    )
    return TitleIndex([read.title(number) for number in range(len(read))])


def search_figures(runs: Sequence[str], data_path: str, first_stage: int) -> dict[str, Figures]:
    """Compute search figures by what a query needs (picture, either, title) and way of searching.

    With `first_stage` > 0, also search in two stages, the first by vectors, and print how many of
    the first ten results of the full search it finds.
    """
    path = f"{data_path}/queries.jsonl"
    needs = [record["needs"] for _, record in read_records(path, "--data-path", {"needs": str})]
    result: dict[str, Figures] = {
        need: defaultdict(list) for need in ("picture", "either", "title")
    }

    def note(way: str, found: Sequence[np.ndarray]) -> None:
        for need, figures in result.items():
            chosen = [number for number, of in enumerate(needs) if of == need]
            figures[way].append(
                search_metrics([found[n] for n in chosen], [queries.products[n] for n in chosen])
            )

    shared = []
    for run in progress(runs, unit="run", desc="searching"):
        scorer = open_run(run, data_path)
        queries = read_queries(path, scorer.catalogue, "--data-path")
        full = search(scorer, queries, ParallelState()).found
        note("InterBERT", full)

        if first_stage:
            staged = search(scorer, queries, ParallelState(), first_stage).found
            note(f"first {first_stage} by vectors", staged)
            shared.append(
                np.mean(
                    [
                        len(np.intersect1d(a[:10], b[:10])) / 10
                        for a, b in zip(full, staged, strict=True)
                    ]
                )
            )

    titles = index_titles(scorer.catalogue)
    random = np.random.default_rng(0)
    note(
        "TF-IDF of titles",
        [np.argsort(-titles.scores(text), kind="stable") for text in queries.texts],
    )
    note("chance", [random.permutation(len(scorer.catalogue)) for _ in queries.texts])

    if first_stage:
        print(
            f"first ten of the full search that the first {first_stage} by vectors hold:"
            f" {100 * np.mean(shared):.2f} %"
        )

    return result


def recommendation_figures(runs: Sequence[str], data_path: str) -> dict[str, Figures]:
    """Compute figures for the ranking of the products shown under each topic: of all of them, and
    of those of the kinds that it wants, among which titles tell little.
    """
    scores: dict[str, list[np.ndarray]] = defaultdict(list)

    for run in progress(runs, unit="run", desc="recommending"):
        scorer = open_run(run, data_path)
        topics = read_topics(f"{data_path}/topics.jsonl", "--data-path")
        clicks = read_clicks(f"{data_path}/clicks.jsonl", topics, scorer.catalogue, "--data-path")
        scores["InterBERT"].append(showing_scores(scorer, topics, clicks, ParallelState()))

    titles = index_titles(scorer.catalogue)
    by_title = np.stack([titles.scores(text) for text in topics.texts])
    scores["TF-IDF of titles"].append(by_title[clicks.topics, clicks.items])
    wanted = [
        wishes(record)
        for _, record in read_records(
            f"{data_path}/topics.jsonl", "--data-path", {"keywords": list}
        )
    ]
    had = [
        had_of(record)
        for _, record in read_records(f"{data_path}/items.jsonl", "--data-path", {"item_id": str})
    ]
    shown = [
        (wanted[topic], had[item]) for topic, item in zip(clicks.topics, clicks.items, strict=True)
    ]
    scores["what clicks were drawn by"].append(
        np.array([topic.appeal(*product) for topic, product in shown])
    )
    scores["chance"].append(np.random.default_rng(0).random(len(shown)))
    right_kind = np.array([kind in topic.kinds for topic, (kind, _, _) in shown])
    result: dict[str, Figures] = {}

    for name, chosen in (
        ("all that was shown", np.ones(len(shown), bool)),
        ("wanted kinds", right_kind),
    ):
        some = Clicks(clicks.topics[chosen], clicks.items[chosen], clicks.clicked[chosen])
        result[name] = {
            way: [click_metrics(some, values[chosen]) for values in of_runs]
            for way, of_runs in scores.items()
        }

    return result


def wishes(record: dict) -> Topic:
    """Rebuild a topic from a line of topics.jsonl; raise UsageError if its keywords lack a part."""
    kinds, colours, places = (
        [table.index(word) for word in record["keywords"] if word in table]
        for table in (KINDS, COLOURS, PLACES)
    )
    if not (kinds and colours and places):
        raise UsageError(
            f"topic {record['topic_id']}: its keywords lack a kind, a colour or a place; make the"
            " shop again with interbert make-shop"
        )

    return Topic(record["name"], np.array(kinds), np.array(colours), places[0])


def had_of(record: dict) -> tuple[int, int, int]:
    """Return the numbers of kind, colour and place of a product, from a line of items.jsonl."""
    return (
        KINDS.index(record["kind"]),
        COLOURS.index(record["colour"]),
        PLACES.index(record["place"]),
    )


def table(head: str, parts: dict[str, Figures]) -> list[str]:
    """Format a table as lines: part and way, then the mean of each figure, with its standard
    deviation if there are several runs.
    """
    rows = [
        (f"{part}: {way}", *(spread([values[name] for values in of_runs]) for name in of_runs[0]))
        for part, figures in parts.items()
        for way, of_runs in figures.items()
    ]
    return aligned([(head, *next(iter(parts.values()))["chance"][0]), *rows])


def spread(values: Sequence[float]) -> str:
    """Format the mean of some values and, if there are several, their deviation: `71.2 ± 0.8`."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"
