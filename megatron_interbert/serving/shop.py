"""What answers: the model, the items and their index. All of it that computes or writes runs in one thread (see batching.py).

Two stages: the vectors of all items against that of the text, then the best of them by the whole model.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.serving.index import JOURNAL, Journal, Stored, VectorIndex
from megatron_interbert.serving.items import Item, LiveItems
from megatron_interbert.tasks.item_match import ItemScorer


@dataclass
class Hit:
    """An item that was found, where it stands, and its score: the margin of the matching head."""

    item: Item
    place: int
    score: float


@dataclass
class Find:
    """Look for the best k items of a text among the best `candidates` of the first stage."""

    text: str
    k: int
    candidates: int


@dataclass
class Score:
    """Score a text with given places."""

    text: str
    places: list[int]


class Shop:
    """The served state: of one version of the index, with what was changed since."""

    def __init__(self, scorer: ItemScorer, stored: Stored) -> None:
        self.scorer, self.version, self.path = scorer, stored.version, stored.path
        self.items: LiveItems = scorer.catalogue
        self.index: VectorIndex = stored.index
        self.items.put(stored.items)
        self.changes = 0
        for record in stored.journal():
            self._apply(record)
        self.journal = Journal(stored.path)

    def _apply(self, record: dict[str, Any]) -> None:
        """One change: `put` items with their vectors, or `remove` an id."""
        self.changes += 1
        if "remove" in record:
            place = self.items.remove(record["remove"])
            if place is not None:
                self.index.remove(place)
            return
        items = [Item(**item) for item in record["put"]]
        before = [self.items.place(item.item_id) for item in items]
        places = self.items.put(items)
        self.index.add(places, self.scorer.item_vectors(np.array(places)))
        for place in before:
            if place is not None:
                self.index.remove(place)

    def put(self, item: Item) -> bool:
        """Add or change an item; whether it is new. It is on disk, and found, when this returns. KeyError where no store has its image."""
        if item.image_id not in self.items.image_numbers:
            raise KeyError(item.image_id)
        new = self.items.place(item.item_id) is None
        self._write({"put": [item.record()]})
        return new

    def remove(self, item_id: str) -> bool:
        """Take an item out; whether it was there."""
        if self.items.place(item_id) is None:
            return False
        self._write({"remove": item_id})
        return True

    def _write(self, record: dict[str, Any]) -> None:
        """On disk first: what cannot be kept does not happen."""
        self.journal.write(record)
        self._apply(record)

    def answer(self, asked: Sequence[Find | Score]) -> list[list[Hit]]:
        """All questions in common passes; the hits of each, best first, or in the order asked for given places."""
        pieces = self.scorer.pieces([question.text for question in asked])
        finds = [number for number, question in enumerate(asked) if isinstance(question, Find)]
        places = [np.array(question.places, np.int64) if isinstance(question, Score) else None for question in asked]
        if finds:
            vectors = self.scorer.text_vectors([pieces[number] for number in finds])
            widest = self.index.search(vectors, max(asked[number].candidates for number in finds))
            for number, found in zip(finds, widest, strict=True):
                places[number] = found[: asked[number].candidates]
        counts = [len(of_question) for of_question in places]
        scores = self.scorer.match(pieces, np.repeat(np.arange(len(asked)), counts), np.concatenate(places).astype(np.int64))
        answers = []
        for question, of_question, own in zip(asked, places, np.split(scores, np.cumsum(counts)[:-1]), strict=True):
            order = np.argsort(-own, kind="stable")[: question.k] if isinstance(question, Find) else range(len(own))
            answers.append([Hit(self.items.item(int(of_question[n])), int(of_question[n]), float(own[n])) for n in order])
        return answers

    def regions(self, text: str, place: int) -> list[dict[str, Any]]:
        """Boxes of an item's picture as shares of its size, and how much each speaks for the match: the margin's gradient times the
        region's feature, summed; the largest is 1."""
        numbers, pieces = np.array([place]), self.scorer.pieces([text])
        fields = self.items.fields(self.items.in_full(pieces, numbers), numbers)
        batch = to_batch(fields).to(self.scorer.device)
        batch = dataclasses.replace(batch, features=batch.features.float().requires_grad_())
        with torch.enable_grad():
            logits = self.scorer.model(batch).itm_logits[0]
            (gradient,) = torch.autograd.grad(logits[0] - logits[1], batch.features)
        weights = (gradient * batch.features).sum(dim=1).detach().cpu().numpy()
        most = float(np.abs(weights).max()) or 1.0
        boxes = batch.locations[batch.region_rows, :4].cpu().numpy().clip(0, 1)
        return [
            {"box": [round(float(x), 4) for x in box], "weight": round(float(weight) / most, 4)}
            for box, weight in zip(boxes, weights, strict=True)
        ]

    def take_over(self, older: "Shop", journal_bytes: int) -> None:
        """Changes that the version before this one has seen since it was read for this one."""
        for record in Stored.records((older.path / JOURNAL).read_bytes()[journal_bytes:] if older.changes else b""):
            self._write(record)

    def close(self) -> None:
        """No more changes."""
        self.journal.close()
