"""Answer questions with a model, the items and their index, and make changes of items.

A search has two stages: compare the text's vector with those of all items, then score the best of
them with the whole model. Once served, only one thread computes and writes (see batching.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.errors import UsageError
from megatron_interbert.serving.index import Damaged, Version, check_finite, needed_from
from megatron_interbert.serving.items import Item, LiveItems
from megatron_interbert.serving.journal import Journal, NotKept, Record, collapsed, read_journal
from megatron_interbert.tasks.shop.scorer import ItemScorer


@dataclass
class Hit:
    """Hold an item that was found, and its score: the margin of the matching head."""

    item: Item
    score: float


@dataclass
class Find:
    """Ask for the best k items for a text among the best `candidates` of the first stage."""

    text: str
    k: int
    candidates: int


@dataclass
class Score:
    """Ask for the scores of a text with given items."""

    text: str
    item_ids: list[str]


class Shop:
    """Serve one version of the index with all changes since; `weights` is the sha256 of the model's
    weights.
    """

    def __init__(self, scorer: ItemScorer, version: Version, weights: str) -> None:
        self.scorer = scorer
        self.version = version
        self.weights = weights
        self.items: LiveItems = scorer.catalogue
        self.index = version.vectors()

        if self.index.width != scorer.model.config.pooled_size:
            raise Damaged(
                f"{version.path}: vectors of {self.index.width} numbers, expected"
                f" {scorer.model.config.pooled_size}"
            )

        self.journal: Journal | None = None
        items = version.items()
        self._check_images(items)
        for place in self.items.stage(items):
            self.items.show(place)

        records, self._read_to = read_journal(version.path.parent, version.mark)
        self._apply(records)

    def _check_images(self, items: Sequence[Item]) -> None:
        for item in items:
            if item.image_id not in self.items.image_numbers:
                raise UsageError(
                    f"{self.version.path}: item {item.item_id} has the image {item.image_id}, which"
                    f" is not in {self.items.corpus.path}; give the store that holds it"
                )

    def begin_to_write(self, journal: Journal) -> None:
        """Take over an opened journal, after making the changes that came since it was read."""
        late, self._read_to = read_journal(self.version.path.parent, self._read_to)
        self._apply(late)
        self.journal = journal

    def check_journal(self) -> None:
        """Raise NotKept if a change could not be saved now."""
        self.journal.check()

    def trim(self) -> None:
        """Drop from the journal the changes that no version needs any more."""
        if self.journal is not None:
            self.journal.trim(needed_from(self.version.path.parent, self.journal.end.journal))

    def _apply(self, records: Sequence[Record]) -> None:
        """Make changes together; vectors come first, because only they can fail."""
        changed = collapsed(records)
        items = [item for item in changed.values() if item is not None]
        self._check_images(items)
        places = self.items.stage(items)
        vectors = self.scorer.item_vectors(np.array(places, np.int64))
        check_finite(items, vectors)
        self._show(places, vectors, [item_id for item_id, item in changed.items() if item is None])

    def _show(self, places: Sequence[int], vectors: np.ndarray, removed: Sequence[str]) -> None:
        before = [self.items.place(self.items.item(place).item_id) for place in places]
        if len(places):
            self.index.add(places, vectors)
        for place in places:
            self.items.show(place)
        for place in [*before, *(self.items.remove(item_id) for item_id in removed)]:
            if place is not None:
                self.index.remove(place)

    def put(self, item: Item) -> bool:
        """Add or change an item, and return whether it is new; it is saved, and found by searches,
        when this returns.

        Raises KeyError if no store has its image, NotKept if its vector is not finite or it cannot
        be saved.
        """
        place = self.items.place(item.item_id)
        if place is not None and self.items.item(place) == item:
            return False

        places = self.items.stage([item])
        vectors = self.scorer.item_vectors(np.array(places))

        try:
            check_finite([item], vectors)
        except UsageError as error:
            raise NotKept(str(error)) from None

        self.journal.write({"put": item.record()})  # first: what cannot be saved does not happen
        self._show(places, vectors, [])

        return place is None

    def remove(self, item_id: str) -> bool:
        """Remove an item, and return whether there was such an item; raises NotKept as `put`
        does.
        """
        if self.items.place(item_id) is None:
            return False
        self.journal.write({"remove": item_id})
        self._show([], np.zeros((0, 0), np.float32), [item_id])

        return True

    def answer(self, asked: Sequence[Find | Score]) -> list[list[Hit]]:
        """Answer questions in one batch: the hits of each, best first, or in the given order of
        items.

        Raises KeyError, with the index in `item_ids`, for an item that does not exist.
        """
        places = [
            self._places(question.item_ids) if isinstance(question, Score) else None
            for question in asked
        ]
        pieces = self.scorer.pieces([question.text for question in asked])
        finds = [number for number, question in enumerate(asked) if isinstance(question, Find)]

        if finds:
            vectors = self.scorer.text_vectors([pieces[number] for number in finds])
            widest = self.index.search(vectors, max(asked[number].candidates for number in finds))
            for number, found in zip(finds, widest, strict=True):
                places[number] = found[: asked[number].candidates]

        counts = [len(of_question) for of_question in places]
        scores = self.scorer.match(
            pieces,
            np.repeat(np.arange(len(asked)), counts),
            np.concatenate(places).astype(np.int64),
        )
        answers = []

        for question, of_question, own in zip(
            asked, places, np.split(scores, np.cumsum(counts)[:-1]), strict=True
        ):
            order = (
                np.argsort(-own, kind="stable")[: question.k]
                if isinstance(question, Find)
                else range(len(own))
            )
            answers.append(
                [Hit(self.items.item(int(of_question[n])), float(own[n])) for n in order]
            )

        return answers

    def _places(self, item_ids: Sequence[str]) -> np.ndarray:
        found = [self.items.place(item_id) for item_id in item_ids]
        if None in found:
            raise KeyError(found.index(None))
        return np.array(found, np.int64)

    def regions(self, text: str, item_id: str) -> list[dict[str, Any]]:
        """Return the boxes of an item's picture, as shares of its size, and how much each region
        speaks for the match.

        A weight is the margin's gradient times the region's feature, summed, and scaled so that the
        largest absolute value is 1. Raises KeyError if there is no such item.
        """
        numbers = self._places([item_id])
        pieces = self.scorer.pieces([text])
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

    def close(self) -> None:
        """Close the journal: no more changes can be made."""
        if self.journal is not None:
            self.journal.close()
