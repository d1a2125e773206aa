"""Test that refused changes are made nowhere, or the answer says where; and that the service names
an address that it cannot use.
"""

import asyncio
import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI, HTTPException

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.app import answer_errors_alike
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import JOURNAL, Journal, NotKept, begin, read_content
from megatron_interbert.serving.server import bind
from megatron_interbert.serving.service import KeptInPart, Service
from megatron_interbert.serving.shop import Shop
from megatron_interbert.serving.start import Opened


class Model:
    """Stand in for a model's thread, with a journal and nothing else."""

    def __init__(self, folder):
        folder.mkdir()
        begin(folder)
        self.journal = Journal(folder)
        self.journal.open()
        self.folder = folder

    async def ask(self, asked, seconds):
        return SimpleNamespace(result=asked(self))

    @property
    def changes(self):
        return len(read_content(self.folder).changes)


@pytest.fixture
def models(tmp_path):
    found = [Model(tmp_path / "search"), Model(tmp_path / "topics")]
    yield found
    for model in found:
        model.journal.close()


def change(models, function):
    service = Service(*models, SimpleNamespace(deadline=1), generated=False)
    return asyncio.run(service.change(function))


def put(model):
    model.journal.write({"remove": "i1"})
    return True


def test_a_change_that_one_model_cannot_keep_is_made_in_none(models):
    assert change(models, put) == [True, True]
    for model in models:
        whole = (model.folder / JOURNAL).read_bytes()
        (model.folder / JOURNAL).write_bytes(b"something else\n")
        with pytest.raises(NotKept):
            change(models, put)
        (model.folder / JOURNAL).write_bytes(whole)
        assert [model.changes for model in models] == [1, 1]


@pytest.mark.parametrize("error", [NotKept("a full disk"), HTTPException(429, "too many")])
def test_a_change_that_was_made_in_part_says_so(models, error):
    """Check a change that the first model has made when the disk is full, or too many wait; sent
    again it is made.
    """

    def fails_late(model):
        if model is models[1]:
            raise error
        return put(model)

    with pytest.raises(KeptInPart):
        change(models, fails_late)

    assert [model.changes for model in models] == [1, 0]

    app = FastAPI()
    answer_errors_alike(app)
    answer = asyncio.run(app.exception_handlers[KeptInPart](None, KeptInPart("a full disk")))
    told = json.loads(answer.body)["error"]
    assert answer.status_code == 503
    assert told == "the change was made for searches but not for recommendations; send it again"


def test_an_item_without_a_finite_vector_is_not_kept(models):
    shop = Shop.__new__(Shop)
    shop.journal = models[0].journal
    shop.items = SimpleNamespace(place=lambda item_id: None, stage=lambda items: [0])
    shop.scorer = SimpleNamespace(item_vectors=lambda places: np.full((1, 8), np.nan, np.float32))
    with pytest.raises(NotKept, match="not finite, the first of item new"):
        shop.put(Item("new", "p1", "title"))

    assert models[0].changes == 0


def test_a_build_without_finite_vectors_leaves_the_folder_as_it_was(tmp_path):
    """Check this even if a new journal would replace one that cannot be used."""
    (tmp_path / JOURNAL).write_text("not ours")
    opened = Opened.__new__(Opened)
    opened.folder = tmp_path
    opened.writes = None
    opened.scorer = lambda: SimpleNamespace(
        catalogue=SimpleNamespace(stage=lambda items: [0]),
        item_vectors=lambda places, told: np.full((1, 8), np.inf, np.float32),
    )
    opened._items = lambda stored: ("", [Item("new", "p1", "title")], None)
    with pytest.raises(UsageError, match="not finite, the first of item new"):
        opened.build()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["building", JOURNAL]
    assert (tmp_path / JOURNAL).read_text() == "not ours"


def test_an_address_that_cannot_be_had_is_told_with_its_reason():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, reason in (
            ("127.0.0.1", r"Address already in use"),
            ("192.0.2.1", r"Cannot assign requested address"),
            ("nope.invalid", r".*[Nn]ame.*"),
            ("é..b", r"not a host name"),
        ):
            with pytest.raises(
                UsageError, match=rf"cannot listen at {host}:{port} \({reason}\); give"
            ):
                bind(host, port)

    bind("127.0.0.1", 0).close()
