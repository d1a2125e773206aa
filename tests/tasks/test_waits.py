"""Test that evaluations wait for the device only to fetch scores: once per tile, part or call,
however many batches these have.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.glue import job as glue
from megatron_interbert.tasks.glue.samples import read_rows
from megatron_interbert.tasks.retrieval.job import score_matrix
from megatron_interbert.tasks.retrieval.tiles import ScoreTiles, fill
from megatron_interbert.tasks.retrieval.two_stage import two_stage_search
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.scorer import ItemScorer
from megatron_interbert.tasks.texts import FramedTexts
from megatron_interbert.tasks.vcr import job as vcr
from megatron_interbert.tasks.vcr.samples import VcrImages, VcrTexts, read_questions
from tests.corpus import VOCABULARY, write_store
from tests.readings import Waits
from tests.tasks.test_retrieval import open_pairs, sizes
from tests.tasks.test_vcr import RECORD, write_regions

CPU = torch.device("cpu")
ALONE = ParallelState()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "s", images=14)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of pairs in each batch, at the fusion of the two sides."""
    seen = []
    original = InterBert.fuse

    def fuse(self: InterBert, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        seen.append(len(text))
        return original(self, text, image)

    monkeypatch.setattr(InterBert, "fuse", fuse)

    return seen


def make(head: str, **options: object) -> InterBert:
    model = InterBert(sizes(), (head,), **options)
    initialise(model, sizes(), 0, ParallelState())
    return model.eval()


def fetches(work: Callable[[], object]) -> int:
    """Return how often some work waits to fetch; assert that it waits for nothing else."""
    with torch.no_grad(), Waits() as waits:
        work()

    assert waits.found == []
    assert waits.sent == []
    assert set(waits.fetched) <= {"cpu"}

    return len(waits.fetched)


def test_what_the_others_rely_on_is_seen() -> None:
    """Check that the tests below cannot pass merely because waits go unnoticed."""
    x = torch.tensor([1, 2, 3])
    for wait in (
        *(
            lambda: x[x > 1],
            lambda: torch.repeat_interleave(x, x),
            lambda: torch.nonzero(x),
            lambda: torch.unique(x),
        ),
        *(
            lambda: torch.bincount(x),
            lambda: torch.masked_select(x, x > 1),
            lambda: int(x[0]),
            lambda: bool(x[0] > 0),
        ),
        *(
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.to(CPU),
            lambda: x.to("cpu"),
            lambda: torch.tensor([1], device=CPU),
        ),
        lambda: torch.segment_reduce(x.float(), "sum", lengths=torch.tensor([3])),
    ):
        with Waits() as waits:
            wait()
        assert waits.found or waits.fetched or waits.sent

    with Waits() as waits:
        torch.repeat_interleave(x, x, output_size=6)
        x.to(CPU, non_blocking=True)
        x[x.flip(0) - 1] = x.max()

    assert not waits.found + waits.fetched + waits.sent


def test_a_tile_of_pairs_is_fetched_once(store: Path, tmp_path: Path, batches: list[int]) -> None:
    pairs = open_pairs(store)
    scorer = PairScorer(make("itm"))
    tiles = ScoreTiles(tmp_path, (len(pairs.captions), len(pairs.images)), (9, 14), {})
    places = tiles.missing()
    assert fetches(lambda: fill(tiles, places, pairs, scorer, CPU, 20)) == len(places)
    assert len(batches) > 3 * len(places)
    assert fetches(lambda: score_matrix(scorer, pairs, CPU, 20, images_at_once=7)) == 2
    tiles.remove()


def test_two_stages_fetch_for_each_run_of_captions(store: Path, batches: list[int]) -> None:
    """Check one fetch for the vectors of all images, then one each for the scores, best images and
    margins of a run.
    """
    pairs = open_pairs(store)
    scorer = PairScorer(make("itm"))
    assert fetches(lambda: two_stage_search(scorer, pairs, CPU, ALONE, 5, 11)) == 1 + 3
    assert len(batches) > 10


def test_items_are_fetched_once_a_call(store: Path, batches: list[int]) -> None:
    items = Catalogue(
        Corpus([str(store)]), CaptionTokenizer(str(store / "vocab.txt")), True, 30, 36
    )
    scorer = ItemScorer(make("itm"), items, CPU, tokens_at_once=60)
    texts = scorer.pieces(["a cat", "the dog runs"])
    chosen = np.tile(np.arange(14), 2)
    assert fetches(lambda: scorer.match(texts, np.repeat([0, 1], 14), chosen)) == 1
    assert len(batches) > 5
    assert fetches(lambda: scorer.text_vectors(texts * 20)) == 1
    assert fetches(lambda: scorer.item_vectors(np.arange(14))) == 1


def test_answers_are_fetched_once(tmp_path: Path, batches: list[int]) -> None:
    detected = write_regions(tmp_path / "detected", {"shot@0": 5})
    images = VcrImages(write_regions(tmp_path / "annotated", {"shot@0": 3}, seed=1), detected, 6)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    texts = VcrTexts(CaptionTokenizer(str(tmp_path / "vocab.txt")), 12, 16)
    records = [{**RECORD, "annot_id": f"train-{number}"} for number in range(7)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    questions = read_questions(str(tmp_path / "q.jsonl"), images)
    model = make("choice")
    assert fetches(lambda: vcr.predict(model, questions.items, images, texts, ALONE, CPU, 2)) == 1
    assert len(batches) == 4


def test_sentences_are_fetched_once(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "the cat runs\t1\na tree\t0\n" * 5)
    rows = read_rows(str(tmp_path / "dev.tsv"), "SST-2")
    texts = FramedTexts(rows.texts, CaptionTokenizer(str(tmp_path / "vocab.txt")), 12)
    model = make("sentence", num_labels=2, text_only=True)
    passes = []
    model.register_forward_hook(lambda *call: passes.append(call))
    assert fetches(lambda: glue.predict(model, texts, ALONE, CPU, 3)) == 1
    assert len(passes) == 4
