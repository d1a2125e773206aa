"""Test real Chinese texts with the vocabulary of bert-base-chinese: normalisation, unknown
characters, lengths, masking rates.
"""

import json
import unicodedata

import numpy as np
import pytest

from megatron_interbert.data.chinese import one_form
from megatron_interbert.data.masking import mask_tokens, word_draws
from megatron_interbert.data.text import CaptionTokenizer
from tests.shared import SHARED, needs_shared

pytest.importorskip("opencc", reason="OpenCC is not installed (pip install -r requirements.txt)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ａ４纸　２包", "A4纸 2包"),
        ("連衣裙，紅色！", "连衣裙，红色！"),
        ("頭髮發展", "头发发展"),  # two characters become one
        ("Nike Air－Max（正品）", "Nike Air－Max（正品）"),
        ("", ""),
        ("😀\u200d🧵 ｗｏｗ", "😀\u200d🧵 wow"),
    ],
)
def test_one_form(text, expected):
    assert one_form(text) == expected
    assert one_form(one_form(text)) == one_form(text)


def texts(kind):
    if kind == "products":
        return [
            product["title"]
            for product in json.loads(
                (SHARED / "data/chinese_products/annotations-1k.json").read_text()
            )
        ]

    if kind == "flickr":
        return list(read_flickr())

    lines = map(
        json.loads, (SHARED / "data/region_features/captions.jsonl").read_text().splitlines()
    )

    return [line["caption"] for line in lines if line["lang"] == "zh"]


def read_flickr():
    for line in (SHARED / "data/captions/flickr8k_zh.txt").read_text().splitlines():
        if line.strip():
            yield line.split(" ", 1)[1]


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(str(SHARED / "data/vocab/bert-base-chinese-vocab.txt"), "chinese")


@needs_shared
@pytest.mark.parametrize(
    ("kind", "count", "unknown"),
    [("products", 1000, None), ("flickr", 40455, None), ("regions", None, 0)],
)
def test_unknown_is_only_what_the_vocabulary_lacks(tokenizer, kind, count, unknown):
    """Check that only texts with a character missing from the vocabulary, looked up one by one,
    contain [UNK].
    """
    found = texts(kind)
    assert count is None or len(found) == count
    known = set(tokenizer.words)
    missing = 0
    pieces = 0
    batch = tokenizer.encode_batch(found)
    ids = np.split(batch.ids, batch.offsets[1:-1])

    for text, of_text in zip(found, ids, strict=True):
        lacking = [c for c in bare(one_form(text)) if c not in known and f"##{c}" not in known]
        assert (tokenizer.unknown in of_text) <= bool(lacking), text
        missing += int((of_text == tokenizer.unknown).sum())
        pieces += len(of_text)

    assert missing / pieces < 0.001, (missing, pieces)
    assert unknown is None or missing == unknown


def bare(text):
    """Return characters as BERT's normaliser leaves them: lower case, without accents, control
    characters and spaces.
    """
    plain = (
        c
        for c in unicodedata.normalize("NFD", text.lower())
        if unicodedata.category(c) not in ("Mn", "Cc", "Cf")
    )
    return [c for c in plain if not c.isspace()]


@needs_shared
def test_words_of_a_segmenter_are_masked_whole(tokenizer):
    """Check that the pieces are the same but grouped into jieba's words; what is not Chinese stays
    as before.
    """
    pytest.importorskip("jieba", reason="jieba is not installed (pip install -r requirements.txt)")
    joined = CaptionTokenizer(tokenizer.vocab_file, "chinese", "jieba")
    text = "红色连衣裙 A4 nike运动鞋"
    by_character, by_word = (t.encode_batch([text, "", text]) for t in (tokenizer, joined))
    assert (by_character.ids == by_word.ids).all()
    pieces = [tokenizer.words[i] for i in by_word.ids]
    begun = np.split(np.arange(len(pieces)), np.flatnonzero(by_word.word_starts)[1:])
    words = ["".join(pieces[i].removeprefix("##") for i in word) for word in begun]
    assert words == ["红色", "连衣裙", "a4", "nike", "运动鞋"] * 2
    whole = joined.encode_batch(texts("products")[:200])
    _, chosen = mask_tokens(
        whole, joined, "paper", np.random.default_rng(0).random((200, word_draws(80)))
    )
    for word in np.split(chosen, np.flatnonzero(whole.word_starts)[1:]):
        assert word.all() or not word.any()

    assert whole.word_starts.mean() < 0.75


@needs_shared
def test_lengths_and_masking_of_titles(tokenizer):
    """Check that nearly all titles fit the recipe's 64 tokens, and that a word (a character, or a
    word in Latin letters) is masked whole or not at all.
    """
    batch = tokenizer.encode_batch(texts("products"))
    lengths = np.diff(batch.offsets) + 2
    assert np.mean(lengths <= 64) > 0.95
    assert 20 < np.median(lengths) < 50
    draws = np.random.default_rng(0).random((len(lengths), word_draws(int(lengths.max()))))
    _, chosen = mask_tokens(batch, tokenizer, "paper", draws)
    assert 0.17 < chosen.mean() < 0.195  # 0.188 asymptotically, less at the start of a title
    starts = np.flatnonzero(batch.word_starts)
    for first, last in zip(starts, [*starts[1:], len(batch.ids)], strict=True):
        assert chosen[first:last].all() or not chosen[first:last].any(), "words are masked whole"
