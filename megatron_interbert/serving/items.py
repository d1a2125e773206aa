"""The items that are served: begun as those of a region store, then added, changed and removed one
by one while searches go on.

An item has a place, a number that is never given again: who has found it can still score it after
it was changed or removed. A change is a new place. What the outside says of items is text only;
pictures are images of the region stores, named by their ids.
"""

import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.shop.catalogue import Catalogue


@dataclass(frozen=True)
class Item:
    """What is known of an item. `attributes` are shown, not read by the model."""

    item_id: str
    image_id: str
    title: str
    attributes: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def item_of(record: Any, where: str) -> Item:
    """Give the item of a record; UsageError where its fields are not an item's."""
    fields = record if isinstance(record, dict) else {}
    texts = [fields.get(name) for name in ("item_id", "image_id", "title")]
    attributes = fields.get("attributes", {})
    known = set(fields) <= {"item_id", "image_id", "title", "attributes"}
    plain = isinstance(attributes, dict) and all(
        isinstance(part, str) for pair in attributes.items() for part in pair
    )

    if not (known and plain and all(isinstance(text, str) for text in texts)):
        raise UsageError(
            f"{where}: no item with item_id, image_id, title and attributes: {str(record)[:60]}"
        )

    return Item(*texts, attributes)


class LiveItems(Catalogue):
    """A catalogue whose items come and go. Safe to read from several threads while one writes."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: CaptionTokenizer,
        max_tokens: int,
        max_regions: int,
        titles: bool = True,
    ) -> None:
        super().__init__(corpus, tokenizer, titles, max_tokens, max_regions)
        self.reads_titles = titles
        self.image_numbers: dict[str, int] = {}

        for number, name in enumerate(super().ids):
            if self.image_numbers.setdefault(name, number) != number:
                raise UsageError(
                    f"{corpus.path}: two images are called {name}; a picture needs an id of its own"
                )

        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._images: list[int] = []
        self._pieces: list[np.ndarray] = []
        self._places: dict[str, int] = {}

    def stored(self) -> Iterable[Item]:
        """Give the items that a store begins with: each image with its first caption as title,
        known by its image id.
        """
        for name, number in self.image_numbers.items():
            caption = int(self.title_of[number])
            yield Item(name, name, self.corpus.caption(caption) if caption >= 0 else "")

    def stage(self, items: Iterable[Item]) -> list[int]:
        """Give places for items that nobody sees yet.

        KeyError names an image that no store holds.
        """
        items = list(items)
        images = [self.image_numbers[item.image_id] for item in items]
        tokens = self.tokenizer.encode_batch(
            [item.title if self.reads_titles else "" for item in items]
        )
        pieces = np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])

        with self._lock:
            first = len(self._items)
            self._items += items
            self._images += images
            self._pieces += [ids[: self.max_tokens] for ids in pieces]

        return list(range(first, first + len(items)))

    def show(self, place: int) -> None:
        """From now on the item is what stands at this place."""
        with self._lock:
            self._places[self._items[place].item_id] = place

    def remove(self, item_id: str) -> int | None:
        """Take an item out; the place that it had, or None."""
        with self._lock:
            return self._places.pop(item_id, None)

    def place(self, item_id: str) -> int | None:
        """Where an item is; None when it is not there."""
        return self._places.get(item_id)

    def item(self, place: int) -> Item:
        """What is, or was, at a place."""
        return self._items[place]

    def current(self) -> list[Item]:
        """Give all items that are there."""
        with self._lock:
            return [self._items[place] for place in self._places.values()]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> list[str]:
        """Item ids by place, of items that have gone too."""
        return [item.item_id for item in self._items]

    def images(self, items: np.ndarray) -> np.ndarray:
        return np.array(
            [self._images[place] if place >= 0 else -1 for place in items.tolist()], np.int64
        )

    def title(self, item: int) -> str:
        return self._items[item].title

    def title_pieces(self, items: np.ndarray) -> list[np.ndarray]:
        return [self._pieces[place] for place in items.tolist()]
