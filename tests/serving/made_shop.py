"""Share helpers between tests of the service: flags, random models, answers by brute force."""

import shutil

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.hf import InterBertForImageTextRetrieval
from megatron_interbert.hf.configuration import InterBertConfig
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.scorer import ItemScorer


def random_model(folder, sizes, store, seed):
    torch.manual_seed(seed)
    model = InterBertForImageTextRetrieval(InterBertConfig.from_model_config(sizes))
    model.save_pretrained(folder)
    shutil.copy(store / "vocab.txt", folder / "vocab.txt")
    return model.eval()


def flags(shop, index, *more):
    folder, _, store = shop
    return (
        "--load",
        folder / "model",
        "--data-path",
        store,
        "--index",
        index,
        "--topics",
        store / "topics.jsonl",
        "--items",
        store / "items.jsonl",
        *more,
    )


def scorer_of(model, store):
    tokenizer = CaptionTokenizer(str(store / "vocab.txt"), "chinese")
    return ItemScorer(
        model.interbert,
        Catalogue(Corpus([str(store)]), tokenizer, True, 64, 36),
        torch.device("cpu"),
    )


def expected(scorer, text, k):
    scores = scorer.match(scorer.pieces([text]), np.zeros(40, np.int64), np.arange(40))
    order = np.argsort(-scores, kind="stable")[:k]
    return [(scorer.catalogue.ids[item], float(scores[item])) for item in order]


def alike(found, wanted):
    assert [item for item, _ in found] == [item for item, _ in wanted]
    assert [score for _, score in found] == pytest.approx(
        [score for _, score in wanted], rel=1e-3, abs=1e-3
    )
