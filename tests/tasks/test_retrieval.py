"""Test caption retrieval: fast scores against one pair at a time, ranks against brute force, tiles,
two stages, training pairs.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.preparation.mining.neighbours import mean_features, nearest_images
from megatron_interbert.tasks.pairs import pair_fields
from megatron_interbert.tasks.retrieval.config import RetrievalConfig
from megatron_interbert.tasks.retrieval.evaluation import metrics_of
from megatron_interbert.tasks.retrieval.job import (
    choose_pairs,
    ranks_of_tiles,
    retrieval_metrics,
    score_matrix,
)
from megatron_interbert.tasks.retrieval.samples import RetrievalSet
from megatron_interbert.tasks.retrieval.tiles import ScoreTiles, fill
from megatron_interbert.tasks.retrieval.two_stage import two_stage_search
from tests.corpus import CLASSES, FEATURES, VOCABULARY, write_store
from tests.dist import run_on_ranks
from tests.sizes import SMALL

CPU = torch.device("cpu")


def sizes(interaction=2, text=1, image=2, fusion="product"):
    return dataclasses.replace(
        SMALL,
        vocab_size=len(VOCABULARY),
        interaction_layers=interaction,
        text_layers=text,
        image_layers=image,
        feature_dim=FEATURES,
        num_classes=CLASSES,
        initializer_range=0.3,
        fusion=fusion,
    )


def make(config, state=None):
    state = state or ParallelState()
    model = InterBert(config, ("itm",), state=state)
    initialise(model, config, 0, state)
    return model.eval()


def open_pairs(path, max_regions=36, max_tokens=36):
    corpus = Corpus([str(path)])
    return choose_pairs(
        corpus, CaptionTokenizer(str(path / "vocab.txt")), "", 0, max_regions, max_tokens
    )


def framed(tokenizer, ids):
    return np.array([tokenizer.cls, *ids, tokenizer.sep]), np.zeros(len(ids) + 2, np.int64)


@torch.no_grad()
def one_by_one(model, pairs):
    """Return scores, float32 [captions, images], from InterBert.forward, one batch per pair."""
    scores = np.empty((len(pairs.captions), len(pairs.images)), np.float32)

    for c, i in itertools.product(range(len(pairs.captions)), range(len(pairs.images))):
        tokens = pairs.corpus.tokens(
            pairs.captions[c : c + 1], pairs.tokenizer, pairs.max_tokens - 2
        )
        text = framed(pairs.tokenizer, tokens.ids)
        regions = read_regions(pairs.corpus, pairs.images[i : i + 1], pairs.max_regions)
        logits = model(to_batch(pair_fields([text], regions, np.array([0]), FEATURES))).itm_logits
        scores[c, i] = logits[0, 0] - logits[0, 1]

    return scores


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "s", images=14)


@pytest.mark.parametrize(
    ("layers", "fusion"),
    [((2, 1, 2), "product"), ((1, 2, 1), "sum"), ((0, 2, 1), "product"), ((2, 0, 0), "product")],
)
def test_fast_scores_are_those_of_one_pair_at_a_time(store, layers, fusion):
    """Check everything that is reused: embeddings, first projections, last layers of first tokens;
    also without some of the modules.
    """
    model = make(sizes(*layers, fusion))
    pairs = open_pairs(store)
    expected = one_by_one(model, pairs)
    assert expected.std() > 0.1, "scores must differ for the comparison to mean anything"

    for pairs_per_batch, images_at_once in ((1000, 256), (13, 5)):
        scores = score_matrix(
            PairScorer(model), pairs, CPU, pairs_per_batch, images_at_once=images_at_once
        )
        np.testing.assert_allclose(scores, expected, atol=1e-4)

    cut = open_pairs(store, max_regions=3, max_tokens=5)
    np.testing.assert_allclose(
        score_matrix(PairScorer(model), cut, CPU), one_by_one(model, cut), atol=1e-4
    )


def brute_force_rank(scores, right):
    """Return the rank of the best right candidate after sorting all, wrong ones first among
    equals.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    return 1 + next(place for place, i in enumerate(order) if right[i])


def test_ranks_of_tiles_equal_brute_force_with_ties():
    random = np.random.default_rng(0)
    for trial in range(40):
        captions = int(random.integers(1, 40))
        images = int(random.integers(1, 12))
        captions = max(captions, images)
        own = np.concatenate([np.arange(images), random.integers(images, size=captions - images)])
        random.shuffle(own)
        scores = (
            random.integers(-3, 4, size=(captions, images)).astype(np.float32)
            if trial % 2
            else random.normal(size=(captions, images)).astype(np.float32)
        )
        height = int(random.integers(1, captions + 1))
        width = int(random.integers(1, images + 1))

        def read(scores=scores, height=height, width=width):
            for top, left in itertools.product(
                range(0, scores.shape[0], height), range(0, scores.shape[1], width)
            ):
                rows = slice(top, min(top + height, scores.shape[0]))
                columns = slice(left, min(left + width, scores.shape[1]))
                yield rows, columns, scores[rows, columns]

        of_captions, of_images = ranks_of_tiles(read, own, images)
        right = own[:, None] == np.arange(images)
        assert of_captions.tolist() == [
            brute_force_rank(scores[c], right[c]) for c in range(captions)
        ]
        assert of_images.tolist() == [
            brute_force_rank(scores[:, i], right[:, i]) for i in range(images)
        ]
        whole = retrieval_metrics(scores, own)
        assert whole["text_to_image"]["R@5"] == 100 * np.mean(of_captions <= 5)
        assert whole["image_to_text"]["mean_rank"] == of_images.mean()


def test_an_interrupted_evaluation_goes_on(store, tmp_path):
    model = make(sizes())
    pairs = open_pairs(store)
    scorer = PairScorer(model)
    shape = (len(pairs.captions), len(pairs.images))
    tiles = ScoreTiles(tmp_path / "tiles", shape, (9, 4), {"weights": 1})
    places = tiles.missing()
    assert len(places) == 4 * 4
    scored = []
    fill(tiles, places[:6], pairs, scorer, CPU, 50, scored.append)
    (tiles.folder / "scores-00000027-00000012.77.new").write_bytes(b"half a tile")
    with pytest.raises(UsageError, match="the same evaluation is running there"):
        ScoreTiles(tmp_path / "tiles", shape, (9, 4), {"weights": 1})

    tiles.release()
    again = ScoreTiles(tmp_path / "tiles", shape, (9, 4), {"weights": 1})
    assert again.missing() == places[6:]
    fill(again, again.missing(), pairs, scorer, CPU, 50)
    assert (
        metrics_of(again, pairs)["t2i_R@5"]
        == retrieval_metrics(one_by_one(model, pairs), pairs.own_image())["text_to_image"]["R@5"]
    )
    other = ScoreTiles(tmp_path / "tiles", shape, (9, 4), {"weights": 2})
    assert len(other.missing()) == 16, "tiles of other weights are not used"
    assert again.missing() == [], "and tiles in use stay"
    again.release()
    other.release()
    ScoreTiles(tmp_path / "tiles", shape, (9, 4), {"weights": 3}).remove()
    assert not list((tmp_path / "tiles").iterdir()), "leftovers of stopped evaluations are gone"


def same_on_ranks(path, folder, tensor, expected):
    state = ParallelState(tensor)
    pairs = open_pairs(path)
    scorer = PairScorer(make(sizes(), state))
    np.testing.assert_allclose(score_matrix(scorer, pairs, CPU, 40, state), expected, atol=1e-4)
    tiles = ScoreTiles(folder, expected.shape, (9, 4), {}, state)
    fill(tiles, tiles.missing(), pairs, scorer, CPU, 50)
    state.barrier()
    whole = retrieval_metrics(expected, pairs.own_image())["text_to_image"]
    found = metrics_of(tiles, pairs)
    assert [found["t2i_R@1"], found["t2i_R@10"]] == [whole["R@1"], whole["R@10"]]
    alone = two_stage_search(
        PairScorer(make(sizes())), pairs, CPU, ParallelState.__new__(Alone), 5, 30
    )
    shared = two_stage_search(scorer, pairs, CPU, state, 5, 30)
    assert {**shared, "seconds": 0} == {**alone, "seconds": 0}


class Alone(ParallelState):
    """Represent a single process, for comparison, inside a launch of several."""

    rank = data_rank = tensor_rank = 0
    world_size = data_size = tensor_size = 1


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2), (4, 2)])
def test_same_scores_on_any_layout(store, tmp_path, ranks, tensor):
    expected = one_by_one(make(sizes()), open_pairs(store))
    run_on_ranks(ranks, same_on_ranks, store, tmp_path / "tiles", tensor, expected)


def test_two_stages_with_all_images_kept_are_exhaustive(store):
    model = make(sizes())
    pairs = open_pairs(store)
    expected = retrieval_metrics(one_by_one(model, pairs), pairs.own_image())["text_to_image"]
    found = two_stage_search(PairScorer(model), pairs, CPU, ParallelState(), 100, 30)
    assert found.pop("seconds") > 0
    assert found == {**expected, "first_stage_R@14": 100.0}
    few = two_stage_search(PairScorer(model), pairs, CPU, ParallelState(), 3, 30)
    assert few["R@1"] <= few["first_stage_R@3"] < 100
    with pytest.raises(UsageError, match="summed fusion"):
        two_stage_search(PairScorer(make(sizes(fusion="sum"))), pairs, CPU, ParallelState(), 3, 30)


@torch.no_grad()
def test_first_stage_is_the_matching_head_on_sides_alone(store):
    """Check its vectors against the model's when the other side has no tokens at all (for text), or
    is missing (for images).
    """

    model = make(sizes())
    pairs = open_pairs(store)
    scorer = PairScorer(model)
    text = scorer.encode_side(pairs.caption_side(scorer, np.arange(6), CPU), images=False)

    for row in range(6):
        tokens = pairs.corpus.tokens(pairs.captions[row : row + 1], pairs.tokenizer, 34)
        batch = to_batch(
            pair_fields(
                [framed(pairs.tokenizer, tokens.ids)], None, np.zeros(0, np.int64), FEATURES
            )
        )
        torch.testing.assert_close(text[row], model(batch).pooled_text[0], atol=1e-4, rtol=1e-4)


def training_set(path, **changes):
    corpus = Corpus([str(path)])
    config = RetrievalConfig(data_path=str(path), micro_batch_size=4, data_partitions=4, **changes)
    return RetrievalSet(corpus, CaptionTokenizer(str(path / "vocab.txt")), config)


def test_four_pairs_of_a_caption(tmp_path):
    path = write_store(tmp_path / "s", images=20, captions_each=3)
    corpus = Corpus([str(path)])
    means = torch.from_numpy(
        np.concatenate([mean_features(corpus, range(7)), mean_features(corpus, range(7, 20))])
    )
    by_hand = np.stack(
        [corpus.stores[0].read(i).features.astype(np.float64).mean(0) for i in range(20)]
    )
    np.testing.assert_allclose(means.numpy(), by_hand, atol=1e-3)
    squares = means.square().sum(dim=1)
    table = np.concatenate(
        [nearest_images(means, squares, range(n, min(n + 6, 20)), 5) for n in range(0, 20, 6)]
    )
    distance = np.linalg.norm(by_hand[:, None] - by_hand[None], axis=2) + 1e9 * np.eye(20)
    assert (table == np.argsort(distance, axis=1)[:, :5]).all()
    assert not training_set(path).has_hard_images
    np.save(path / "hard_images.npy", table)
    samples = training_set(path)
    assert samples.has_hard_images
    hard = set()
    wrong_images = set()
    wrong_texts = set()

    for epoch in range(30):
        pairs = [(epoch, caption) for caption in (0, 31, 59)]
        fields = samples.fields(pairs)
        assert fields["mismatched"].tolist() == [0, 1, 1, 1] * 3
        assert fields["sample_ids"].tolist() == [c for c in (0, 31, 59) for _ in range(4)]

        for row, caption in enumerate((0, 31, 59)):
            own = samples.corpus.caption_image[caption]
            texts = [text_of(samples, fields, 4 * row + kind) for kind in range(4)]
            images = [image_of(samples, fields, 4 * row + kind) for kind in range(4)]
            assert texts[0] == texts[2] == samples.corpus.caption(caption)
            assert images[0] == images[1] == images[3] == own != images[2]
            assert image_with(samples, texts[3], table[own]), "hard captions are of near images"
            hard.add(texts[3])
            wrong_texts.add(texts[1])
            wrong_images.add(images[2])

        again = training_set(path).fields(pairs[::-1])
        assert [text_of(samples, again, row) for row in range(4)] == texts, (
            "the same pairs wherever the caption is in the batch"
        )

    assert len(hard) > 20, "from all near images and all their captions"
    assert len(wrong_images) > 12
    assert len(wrong_texts) > 25


def text_of(samples, fields, row):
    ids = fields["token_ids"][fields["text_offsets"][row] + 1 : fields["text_offsets"][row + 1] - 1]
    wanted = ids.tolist()
    corpus = samples.corpus

    return next(
        corpus.caption(c)
        for c in range(corpus.num_captions)
        if corpus.tokens(np.array([c]), samples.tokenizer, 28).ids.tolist() == wanted
    )


def image_of(samples, fields, row):
    start = fields["image_offsets"][row] - row  # one [IMG] before the regions of each image
    first = fields["features"][start]
    return next(
        i
        for i in range(samples.corpus.num_images)
        if (samples.corpus.stores[0].read(i).features[0] == first).all()
    )


def image_with(samples, text, images):
    corpus = samples.corpus
    return any(
        corpus.caption(c) == text
        for c in range(corpus.num_captions)
        if corpus.caption_image[c] in images
    )


def test_what_cannot_be_trained_on(tmp_path):
    path = write_store(tmp_path / "one", images=1, captions_each=8)
    with pytest.raises(UsageError, match="captions of two images or more"):
        training_set(path)

    path = write_store(tmp_path / "s", images=20)
    np.save(path / "hard_images.npy", np.zeros((3, 2), np.int32))

    with pytest.raises(
        UsageError, match=r"expected one row for each of 20 images.*mine-neighbours"
    ):
        training_set(path)
