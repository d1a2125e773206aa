#!/usr/bin/env python3
"""How far a product search beats TF-IDF over titles, for queries that need the picture and for others; for the generated shop.

    python tools/shop_report.py --load runs/shop_product_search --data-path sample_shop/test

Queries say what they need (tools/make_shop.py). TF-IDF compares single characters and pairs of them. Chance is a shuffled list.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.downstream.items import Catalogue
from megatron_interbert.data.downstream.product_search import read_queries
from megatron_interbert.data.downstream.records import read_records
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import run_entry
from megatron_interbert.parallel.state import ParallelState, this_device
from megatron_interbert.tasks.item_scorer import ItemScorer
from megatron_interbert.tasks.loading import load_model
from megatron_interbert.tasks.product_search import search
from megatron_interbert.tasks.ranking import search_metrics
from megatron_interbert.training.processes import aligned
from megatron_interbert.weights.files import write_json


class TitleIndex:
    """TF-IDF of characters and pairs of characters."""

    def __init__(self, titles: list[str]) -> None:
        counts = [self.grams(title) for title in titles]
        found = Counter(gram for count in counts for gram in count)
        self.weight = {gram: np.log(len(titles) / number) for gram, number in found.items()}
        self.titles = [self.vector(count) for count in counts]

    @staticmethod
    def grams(text: str) -> Counter[str]:
        """Counts of a text."""
        text = text.lower()
        return Counter(text[at : at + size] for size in (1, 2) for at in range(len(text) - size + 1))

    def vector(self, counts: Counter[str]) -> dict[str, float]:
        """Of length 1."""
        raw = {gram: number * self.weight[gram] for gram, number in counts.items() if gram in self.weight}
        length = sum(value * value for value in raw.values()) ** 0.5 or 1.0
        return {gram: value / length for gram, value in raw.items()}

    def order(self, query: str) -> np.ndarray:
        """Titles by number, best first."""
        wanted = self.vector(self.grams(query))
        scores = [sum(value * title.get(gram, 0.0) for gram, value in wanted.items()) for title in self.titles]
        return np.argsort(-np.array(scores), kind="stable")


def run() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a finetuned product search")
    parser.add_argument(
        "--data-path", default="sample_shop/test", help="generated products with queries.jsonl (default: %(default)s)"
    )
    parser.add_argument("--first-stage", type=int, default=0, help="search in two stages; 0: all products in full")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    device = this_device()
    model, source = load_model(options.load, ("itm",), "auto", device)
    trained = source.facts.get("run") or {}
    tokenizer = CaptionTokenizer(f"{options.data_path}/vocab.txt", source.config.text_normalisation)
    sizes = (trained.get("max_tokens") or 64, trained.get("max_regions") or 36)
    catalogue = Catalogue(Corpus([options.data_path]), tokenizer, trained.get("titles", True), *sizes)
    queries = read_queries(f"{options.data_path}/queries.jsonl", catalogue, "--data-path")
    needs = [record["needs"] for _, record in read_records(f"{options.data_path}/queries.jsonl", "--data-path", {"needs": str})]
    titles = TitleIndex([catalogue.corpus.caption(number) for number in range(len(catalogue))])
    random = np.random.default_rng(0)
    ways = {
        "InterBERT": search(ItemScorer(model, catalogue, device), queries, ParallelState(), options.first_stage).found,
        "TF-IDF of titles": [titles.order(text) for text in queries.texts],
        "chance": [random.permutation(len(catalogue)) for _ in queries.texts],
    }
    figures = {}
    for kind in ("picture", "either", "title"):
        chosen = [number for number, need in enumerate(needs) if need == kind]
        for way, found in ways.items():
            metrics = search_metrics([found[n] for n in chosen], [queries.products[n] for n in chosen])
            figures[f"{kind}: {way}"] = {"queries": len(chosen), **metrics}
    head = ("what tells: way", *next(iter(figures.values())))
    print(
        "\n".join(
            aligned(
                [head, *((name, *(f"{v:.1f}" if isinstance(v, float) else v for v in f.values())) for name, f in figures.items())]
            )
        )
    )
    if options.output:
        write_json(options.output, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    run_entry(run)
