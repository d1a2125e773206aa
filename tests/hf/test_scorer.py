"""The scorer against the model one pair at a time and against the evaluation's matrix; wrong images
and captions.
"""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import normalised_locations
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import (
    InterBertConfig,
    InterBertForImageTextRetrieval,
    InterBertForPreTraining,
    InterBertModel,
    InterBertScorer,
)
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.tasks.retrieval.job import choose_pairs, score_matrix
from tests.corpus import CLASSES, FEATURES, VOCABULARY, write_store
from tests.hf.small import SMALL

SIZES = dataclasses.replace(
    SMALL, vocab_size=len(VOCABULARY), feature_dim=FEATURES, num_classes=CLASSES
)
IMAGES = 5
CAPTIONS = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A store, a model folder with its vocabulary, and the scorer of that folder."""
    folder = tmp_path_factory.mktemp("corpus")
    store = RegionStore(str(write_store(folder / "store", images=8)))
    torch.manual_seed(0)
    InterBertForPreTraining(InterBertConfig.from_model_config(SIZES)).save_pretrained(
        folder / "model"
    )
    (folder / "model" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")

    return store, folder / "model", InterBertScorer.from_pretrained(folder / "model", device="cpu")


def one_by_one(model, tokenizer, images, captions):
    """float32 [images, captions]: a batch of one pair at a time, no padding anywhere."""
    scores = np.zeros((len(images), len(captions)), np.float32)

    for i, regions in enumerate(images):
        for c, caption in enumerate(captions):
            ids = [tokenizer.cls, *tokenizer.encode(caption, 40).ids, tokenizer.sep]
            places = normalised_locations(regions.boxes, regions.size)

            with torch.no_grad():
                logits = model(
                    torch.tensor([ids]),
                    visual_feats=torch.tensor(regions.features)[None],
                    visual_pos=torch.tensor(places)[None],
                ).itm_logits[0]

            scores[i, c] = logits[0] - logits[1]

    return scores


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_all_pairs(corpus, batch_size):
    store, _, scorer = corpus
    images = [store.read(i) for i in range(IMAGES)]
    captions = [store.caption(c) for c in range(CAPTIONS)]
    assert len({len(image.features) for image in images}) > 1
    assert len({len(caption.split()) for caption in captions}) > 2
    scores = scorer.score(images, captions, batch_size=batch_size)
    assert scores.dtype == np.float32
    assert scores.shape == (IMAGES, CAPTIONS)
    expected = one_by_one(scorer.model, scorer.tokenizer, images, captions)
    assert len(np.unique(expected)) == expected.size
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    paired = scorer.score(images, captions[:IMAGES], batch_size=batch_size, paired=True)
    np.testing.assert_allclose(paired, np.diagonal(expected), rtol=1e-4, atol=1e-5)


def test_same_scores_as_the_evaluation(corpus):
    store, _, scorer = corpus
    pairs = choose_pairs(Corpus([str(store.path)]), scorer.tokenizer, "", IMAGES, 36, 36)
    theirs = score_matrix(PairScorer(scorer.model.interbert), pairs, torch.device("cpu"))
    ours = scorer.score(
        [store.read(int(i)) for i in pairs.images], [store.caption(int(c)) for c in pairs.captions]
    )
    np.testing.assert_allclose(ours, theirs.T, rtol=1e-4, atol=1e-5)


def test_dicts_single_ones_and_none(corpus):
    store, _, scorer = corpus
    image = store.read(3)
    caption = store.caption(1)
    as_dict = {
        "features": image.features.astype(np.float64).tolist(),
        "boxes": image.boxes.tolist(),
        "size": image.size,
    }
    single = scorer.score(image, caption)
    assert single.shape == (1, 1)
    assert scorer.score(as_dict, [caption]) == single
    assert scorer.score([as_dict], caption, paired=True) == single[0]
    outside = {
        **as_dict,
        "boxes": np.where(image.boxes == image.boxes.max(axis=0), image.boxes + 1e4, image.boxes),
    }
    clipped = {**as_dict, "boxes": np.minimum(outside["boxes"], [*image.size, *image.size])}
    assert scorer.score(outside, caption) == scorer.score(clipped, caption) != single
    assert scorer.score([], [caption]).shape == (0, 1)
    assert scorer.score([image], []).shape == (1, 0)
    assert scorer.score([], [], paired=True).shape == (0,)


def test_captions_are_cut(corpus):
    store, _, scorer = corpus
    image = store.read(0)
    words = "red cat " * 40
    assert scorer.score(image, words) == scorer.score(image, " ".join(words.split()[:38]))
    short = InterBertScorer(scorer.model, scorer.tokenizer, max_tokens=5)
    assert short.score(image, words) == short.score(image, "red cat red")


def test_it_draws_nothing_and_drops_nothing(corpus):
    store, folder, _ = corpus
    model = InterBertForImageTextRetrieval.from_pretrained(folder).train()
    scorer = InterBertScorer(model, CaptionTokenizer(str(folder / "vocab.txt")))
    assert np.array_equal(
        scorer.score(store.read(0), "a red cat"), scorer.score(store.read(0), "a red cat")
    )


def good_image():
    return {
        "features": np.ones((3, FEATURES)),
        "boxes": np.array([[0, 0, 5, 5.0]] * 3),
        "size": (10, 10),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": np.ones((3, 7))},
            r"image 1: features have shape \[3, 7\], expected \[regions, 24\]",
        ),
        ({"features": np.ones((0, FEATURES))}, r"image 1: features have shape \[0, 24\]"),
        (
            {"features": np.full((3, FEATURES), np.nan)},
            "image 1: features or boxes hold NaN or infinity",
        ),
        ({"boxes": np.ones((2, 4))}, r"image 1: boxes have shape \[2, 4\], expected \[3, 4\]"),
        ({"boxes": np.full((3, 4), np.inf)}, "image 1: features or boxes hold NaN or infinity"),
        ({"size": (0, 10)}, r"image 1: size is \(0, 10\), expected width and height above 0"),
        ({"size": 10}, "image 1: size is 10"),
        ({"size": None}, "image 1: size is None"),
    ],
)
def test_wrong_images_are_named(corpus, change, message):
    with pytest.raises(UsageError, match=message):
        corpus[2].score([good_image(), {**good_image(), **change}], "a cat")


def test_other_wrong_use_is_named(corpus, tmp_path):
    _, folder, scorer = corpus
    with pytest.raises(UsageError, match="image 0: no 'features'"):
        scorer.score([np.ones((3, FEATURES))], "a cat")
    with pytest.raises(UsageError, match="image 0: no 'size', expected features, boxes and size"):
        scorer.score({"features": [], "boxes": []}, "a cat")
    with pytest.raises(UsageError, match="caption 1 is of type int, expected text"):
        scorer.score(good_image(), ["a cat", 3])
    with pytest.raises(UsageError, match="paired: 2 images and 1 captions"):
        scorer.score([good_image()] * 2, "a cat", paired=True)
    with pytest.raises(UsageError, match="batch_size is 0"):
        scorer.score(good_image(), "a cat", batch_size=0)
    with pytest.raises(UsageError, match="batch_size is -1"):
        scorer.encode_text("a cat", batch_size=-1)
    with pytest.raises(UsageError, match="batch_size is 0"):
        scorer.encode_image(good_image(), batch_size=0)
    with pytest.raises(UsageError, match="top_k is 0"):
        scorer.rank(good_image(), ["a cat"], top_k=0)
    with pytest.raises(UsageError, match="InterBertModel has no matching head"):
        InterBertScorer(InterBertModel.from_pretrained(folder), scorer.tokenizer)

    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]) + "\n")
    with pytest.raises(UsageError, match="28 entries, the model has 27"):
        InterBertScorer(scorer.model, CaptionTokenizer(str(tmp_path / "vocab.txt")))
    with pytest.raises(UsageError, match=r"nowhere: no such folder; give one that `convert`"):
        InterBertScorer.from_pretrained(tmp_path / "nowhere")

    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=r"bare: has no vocab\.txt; copy the vocabulary"):
        InterBertScorer.from_pretrained(tmp_path / "bare")


def test_rank_is_the_order_of_the_scores(corpus):
    store, _, scorer = corpus
    images = [store.read(i) for i in range(IMAGES)]
    captions = [store.caption(c) for c in range(CAPTIONS)]
    scores = scorer.score(images, captions)
    ranked = scorer.rank(images[1], captions, top_k=3)
    assert [found.index for found in ranked] == np.argsort(-scores[1])[:3].tolist()
    assert [found.score for found in ranked] == pytest.approx(sorted(scores[1])[::-1][:3], abs=1e-5)
    assert [found.index for found in scorer.rank(images, captions[2])] == np.argsort(
        -scores[:, 2]
    ).tolist()
    with pytest.raises(UsageError, match="rank: 5 images and 7 captions, expected one image or"):
        scorer.rank(images, captions)


def test_sides_alone_against_the_layers_one_item_at_a_time(corpus):
    """Pooled vectors of interaction, stream and pooler over one side, written out in the test."""
    store, _, scorer = corpus
    inner = scorer.model.interbert
    captions = [store.caption(c) for c in range(3)]
    images = [store.read(i) for i in range(3)]
    texts = scorer.encode_text(captions, batch_size=2)
    pictures = scorer.encode_image(images, batch_size=2)
    assert texts.shape == pictures.shape == (3, SIZES.pooled_size)
    with torch.no_grad():
        for number, caption in enumerate(captions):
            ids = scorer.token_ids(number, caption)
            places = torch.arange(len(ids))
            x = inner.text_embedding(ids, places, torch.zeros_like(ids))
            whole = Sequences(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
            x = inner.text_stream(inner.interaction(x, whole)[0], whole)[0]
            expected = inner.text_pooler(x[:1])[0].numpy()
            np.testing.assert_allclose(texts[number], expected, atol=1e-5)
    shuffled = scorer.encode_image(images[::-1], batch_size=3)[::-1]
    np.testing.assert_allclose(pictures, shuffled, atol=1e-5)
    assert scorer.encode_text([]).shape == (0, SIZES.pooled_size)
