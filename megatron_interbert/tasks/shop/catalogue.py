"""Hold the items that texts are matched with, and lay out batches of texts and items.

An item is an image of a region store, known by its image id; its title, if any, is the image's
first caption. A text (a query, a topic) is matched with an item in two ways. In full: [CLS] text
[SEP] title [SEP] and the regions in one sequence. Alone: the text and the item (title and regions)
are encoded separately, and only their pooled vectors meet in the matching head, so that the vectors
of items can be computed in advance.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.image_names import match_names
from megatron_interbert.data.region_batch import Allocate, plain_memory, read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.pairs import Text, frame, pair_fields

NO_TITLE = -1


class Catalogue:
    """Hold the items of a corpus, numbered like its images; `titles` says whether titles are
    read.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: CaptionTokenizer,
        titles: bool,
        max_tokens: int,
        max_regions: int,
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_regions = max_regions
        self.title_of = np.full(corpus.num_images, NO_TITLE, np.int64)  # caption number

        if titles:
            # written in reverse, so that the first caption of an image wins
            captions = np.arange(corpus.num_captions)[::-1]
            self.title_of[corpus.caption_image[captions]] = captions

        self._numbers: dict[str, int] | None = None

    def __len__(self) -> int:
        return self.corpus.num_images

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_numbers": None}

    @property
    def ids(self) -> list[str]:
        """Return the item ids, in the order of their numbers."""
        return [
            store.image_id(image)
            for store in self.corpus.stores
            for image in range(store.num_images)
        ]

    def numbers(self, item_ids: Iterable[str]) -> dict[str, int]:
        """Find the numbers of items by their ids, or by other spellings that mean one item only.

        Raises UsageError if two images have the same id.
        """
        if self._numbers is None:
            self._numbers = {}
            for number, name in enumerate(self.ids):
                if self._numbers.setdefault(name, number) != number:
                    raise UsageError(
                        f"{self.corpus.path}: two images have the id {name}; each item needs its"
                        " own id"
                    )

        return match_names(item_ids, self._numbers)

    def images(self, items: np.ndarray) -> np.ndarray:
        """Return the image numbers of items [n]; -1 stands for no item."""
        return items

    def region_counts(self, items: np.ndarray) -> np.ndarray:
        """Return the number of regions that are read of each item [n]; 0 for no item (-1)."""
        images = self.images(items)
        return np.where(
            images < 0, 0, np.minimum(self.corpus.region_counts[images], self.max_regions)
        )

    def title(self, item: int) -> str:
        """Return the title of an item; empty if it has none."""
        return (
            "" if self.title_of[item] == NO_TITLE else self.corpus.caption(int(self.title_of[item]))
        )

    def title_pieces(self, items: np.ndarray) -> list[np.ndarray]:
        """Return the token ids of the titles of items [n]; empty arrays if they have none."""
        captions = self.title_of[items]
        titled = np.flatnonzero(captions != NO_TITLE)
        pieces = [np.zeros(0, np.int64)] * len(items)

        if len(titled):
            tokens = self.corpus.tokens(captions[titled], self.tokenizer, self.max_tokens)
            for place, ids in zip(
                titled.tolist(), np.split(tokens.ids, tokens.offsets[1:-1]), strict=True
            ):
                pieces[place] = ids.astype(np.int64)

        return pieces

    def in_full(self, texts: Sequence[np.ndarray], items: np.ndarray) -> list[Text]:
        """Return [CLS] text [SEP] title [SEP] of n pairs of a text, as token ids, and an item."""
        return [
            frame([text, title] if len(title) else [text], self.tokenizer, self.max_tokens)
            for text, title in zip(texts, self.title_pieces(items), strict=True)
        ]

    def text_alone(self, text: np.ndarray) -> Text:
        """Return [CLS] text [SEP]."""
        return frame([text], self.tokenizer, self.max_tokens)

    def items_alone(self, items: np.ndarray) -> list[Text]:
        """Return [CLS] title [SEP] of items [n]."""
        return [
            frame([title], self.tokenizer, self.max_tokens) for title in self.title_pieces(items)
        ]

    def fields(
        self, texts: Sequence[Text], items: np.ndarray, allocate: Allocate = plain_memory
    ) -> Fields:
        """Return the fields of a PackedBatch of B texts, each with the regions of an item, or with
        none (-1).
        """
        images = self.images(items)
        shown = np.unique(images[images >= 0])
        if not len(shown):
            return pair_fields(texts, None, images, self.corpus.feature_dim)

        regions = read_regions(self.corpus, shown, self.max_regions)
        places = np.where(images < 0, -1, np.searchsorted(shown, images))

        return pair_fields(texts, regions, places, self.corpus.feature_dim, allocate)

    def both_ways(
        self,
        texts: Sequence[np.ndarray],
        text_of: np.ndarray,
        items: np.ndarray,
        alone: tuple[np.ndarray, np.ndarray],
        allocate: Allocate = plain_memory,
    ) -> Fields:
        """Return the fields of a PackedBatch that scores n pairs in full, then m pairs alone.

        `texts` are token ids; `text_of` [n] and `items` [n] are the pairs in full, `alone` (texts
        [m], items [m]) those alone. `pair_text` and `pair_image` [n + m] say which rows make a
        pair.
        """
        pairs = len(items)
        asked, alone_text = np.unique(alone[0], return_inverse=True)
        shown, alone_item = np.unique(alone[1], return_inverse=True)
        rows = [
            *self.in_full([texts[t] for t in text_of], items),
            *(self.text_alone(texts[t]) for t in asked),
            *self.items_alone(shown),
        ]
        fields = self.fields(
            rows, np.concatenate([items, np.full(len(asked), -1), shown]), allocate
        )
        each = np.arange(pairs)

        return {
            **fields,
            "pair_text": np.concatenate([each, pairs + alone_text]),
            # counts only the rows that have an image
            "pair_image": np.concatenate([each, pairs + alone_item]),
        }


def pair_keys(texts: np.ndarray, items: np.ndarray, count: int) -> np.ndarray:
    """Return a key, int64, for each pair of a text and one of `count` items."""
    return texts.astype(np.int64) * count + items
