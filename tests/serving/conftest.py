"""Provide fixtures for all tests of the service: a small shop, a random model, a browser (Debian's
Chromium, headless).
"""

import dataclasses
import shutil
import sys

import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.presets import PRESETS, fit_to_data
from tests.launching import launch
from tests.serving.made_shop import random_model, scorer_of


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """Generate a shop of 40 products, and a Hugging Face folder with random but large weights;
    return (folder, model, store).
    """
    folder = tmp_path_factory.mktemp("serving")
    sizes = (
        "--train-products",
        2,
        "--test-products",
        40,
        "--train-queries",
        2,
        "--test-queries",
        8,
        "--train-topics",
        2,
        "--test-topics",
        3,
    )
    code, out, err = launch(
        sys.executable, "tools/make_shop.py", "--output", folder / "shop", *sizes
    )
    assert code == 0, out + err
    store = folder / "shop" / "test"
    tokenizer = CaptionTokenizer(str(store / "vocab.txt"), "chinese")
    corpus = Corpus([str(store)])
    sizes = fit_to_data(
        PRESETS["sample-chinese"],
        tokenizer.vocab_size,
        corpus.feature_dim,
        corpus.num_classes,
        "test",
    )
    sizes = dataclasses.replace(sizes, initializer_range=0.4)

    return folder, random_model(folder / "model", sizes, store, seed=0), store


@pytest.fixture(scope="session")
def scorer(shop):
    _, model, store = shop
    return scorer_of(model, store)


# while it is open, this thread can run no other event loop
@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (pip install -r requirements.txt)",
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser, request):
    """Return visit(url, width, language), which opens a page as a new visitor; assert at the end
    that no error reached its console and no request went elsewhere.
    """
    problems = []
    contexts = []

    def go(url, width=1280, language="zh-CN"):
        context = browser.new_context(viewport={"width": width, "height": 800}, locale=language)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: problems.append(message.text) if message.type == "error" else None,
        )
        page.on(
            "request",
            lambda asked: (
                problems.append(asked.url) if not asked.url.startswith((url, "data:")) else None
            ),
        )
        page.goto(url)

        return page

    yield go
    for context in contexts:
        context.close()

    allowed = getattr(request.node, "allowed", ())
    assert [problem for problem in problems if not any(word in problem for word in allowed)] == []
