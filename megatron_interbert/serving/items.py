"""Hold the items that are served, which are added, changed and removed one by one while searches
continue.

An item has a place, a number that is never reused, so that a search can still score it after it was
changed or removed. A changed item gets a new place. Clients only send texts about items; pictures
are images of the region stores, named by their ids.
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
    """Hold what is known of an item; `attributes` are shown, but not read by the model."""

    item_id: str
    image_id: str
    title: str
    attributes: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the item as a JSON object."""
        return asdict(self)


def item_of(record: Any, where: str) -> Item:
    """Return the item in a JSON object; raises UsageError if its fields are not those of an
    item.
    """
    fields = record if isinstance(record, dict) else {}
    texts = [fields.get(name) for name in ("item_id", "image_id", "title")]
    attributes = fields.get("attributes", {})
    known = set(fields) <= {"item_id", "image_id", "title", "attributes"}
    plain = isinstance(attributes, dict) and all(
        isinstance(part, str) for pair in attributes.items() for part in pair
    )

    if not (known and plain and all(isinstance(text, str) for text in texts)):
        raise UsageError(
            f"{where}: not an item with item_id, image_id, title and attributes: {str(record)[:60]}"
        )

    return Item(*texts, attributes)


class LiveItems(Catalogue):
    """Hold a catalogue whose items change; several threads may read it while one writes."""

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
                    f"{corpus.path}: two images have the id {name}; each picture needs its own id"
                )

        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._images: list[int] = []
        self._pieces: list[np.ndarray] = []
        self._places: dict[str, int] = {}

    def stored(self) -> Iterable[Item]:
        """Yield the items of the stores: each image, under its image id, with its first caption as
        title.
        """
        for name, number in self.image_numbers.items():
            caption = int(self.title_of[number])
            yield Item(name, name, self.corpus.caption(caption) if caption >= 0 else "")

    def stage(self, items: Iterable[Item]) -> list[int]:
        """Add items that are not visible yet, and return their places.

        Raises KeyError with the id of an image that no store holds.
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
        """Make the item at this place visible, in place of an earlier one with its id."""
        with self._lock:
            self._places[self._items[place].item_id] = place

    def remove(self, item_id: str) -> int | None:
        """Remove an item; return the place that it had, or None if there was no such item."""
        with self._lock:
            return self._places.pop(item_id, None)

    def place(self, item_id: str) -> int | None:
        """Return the place of an item; None if there is no such item."""
        return self._places.get(item_id)

    def item(self, place: int) -> Item:
        """Return the item that is, or was, at a place."""
        return self._items[place]

    def current(self) -> list[Item]:
        """Return all visible items."""
        with self._lock:
            return [self._items[place] for place in self._places.values()]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> list[str]:
        """Return the item ids by place, including those of removed items."""
        return [item.item_id for item in self._items]

    def images(self, items: np.ndarray) -> np.ndarray:
        return np.array(
            [self._images[place] if place >= 0 else -1 for place in items.tolist()], np.int64
        )

    def title(self, item: int) -> str:
        return self._items[item].title

    def title_pieces(self, items: np.ndarray) -> list[np.ndarray]:
        return [self._pieces[place] for place in items.tolist()]
