"""Join one or more region stores into one corpus, with captions and images numbered consecutively
in the order of the stores.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_interbert.data.clusters import RegionClusters
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer, TokenBatch
from megatron_interbert.errors import UsageError

MAX_ENTRY = 16  # characters of a detector's entry in an error; hashes are longer


class Corpus:
    """Represent captions 0 .. num_captions-1 and images 0 .. num_images-1 of all stores, whose
    features must come from one detector.
    """

    def __init__(
        self, paths: Sequence[str], strict_boxes: bool = False, allow_other_detector: bool = False
    ) -> None:
        if not paths:
            raise UsageError(
                "--data-path is missing; give a region store, or make the sample corpus with"
                " interbert make-sample"
            )

        self.stores = [RegionStore(path, strict_boxes) for path in paths]
        first = self.stores[0]
        self.strict_boxes = strict_boxes
        self.feature_dim = first.feature_dim
        self.num_classes = first.num_classes
        self.clusters: list[RegionClusters] = []  # of each store, if they stand for classes
        for other in self.stores[1:]:
            self.check_alike(other, allow_other_detector)

        self.first_image = np.cumsum([0, *(store.num_images for store in self.stores)])
        self.first_caption = np.cumsum([0, *(store.num_captions for store in self.stores)])
        self.num_images = int(self.first_image[-1])
        self.num_captions = int(self.first_caption[-1])
        self.caption_image = np.concatenate(
            [
                s.caption_image + start
                for s, start in zip(self.stores, self.first_image, strict=False)
            ]
        )
        self.region_counts = np.concatenate([store.region_counts() for store in self.stores])
        self.added: TokenBatch | None = None  # texts that are in no store, after all captions
        # tables of mined neighbours, by the store's method
        self._opened: dict[str, list[np.ndarray | None]] = {}

    def check_alike(
        self, other: RegionStore, allow_other_detector: bool, flag: str = "--data-path"
    ) -> None:
        """Raise UsageError unless a store has the feature size, classes and detector of this
        corpus.
        """
        first = self.stores[0]
        if (other.feature_dim, other.num_classes) != (first.feature_dim, first.num_classes):
            raise UsageError(
                f"{flag} {other.path}: features of size {other.feature_dim} and"
                f" {other.num_classes} classes, but {first.path} has {first.feature_dim} and"
                f" {first.num_classes}; use stores of one detector"
            )

        if len({first.num_attributes, other.num_attributes} - {0}) > 1:
            raise UsageError(
                f"{flag} {other.path}: {other.num_attributes} attributes of regions, but"
                f" {first.path} has {first.num_attributes}; use stores of one detector"
            )

        check_detector(
            first.manifest["detector"],
            other.manifest["detector"],
            f"{flag} {other.path}",
            allow_other_detector,
        )

    @property
    def num_attributes(self) -> int:
        """Return the number of attributes that regions may have, 0 if some store has none."""
        return min(store.num_attributes for store in self.stores)

    def label_by(self, source: str) -> None:
        """Choose what the classes of regions are: "detector", "clusters", or "auto", which is the
        detector's classes if all stores have them, else clusters if all have those.

        Raises UsageError if clusters are missing or differ between the stores.
        """
        have_clusters = all("clusters" in store.manifest for store in self.stores)
        if source == "clusters" or (source == "auto" and not self.has_labels and have_clusters):
            self.clusters = [RegionClusters(store) for store in self.stores]
            self.num_classes = self.clusters[0].count
            for store, clusters in zip(self.stores, self.clusters, strict=True):
                self.check_clusters(store, clusters)

    def check_clusters(
        self, store: RegionStore, clusters: RegionClusters, flag: str = "--data-path"
    ) -> None:
        """Raise UsageError unless clusters of a store mean the same as those of this corpus."""
        if clusters.centroids != self.clusters[0].centroids:
            raise UsageError(
                f"{flag} {store.path}: its clusters have other centroids than those of"
                f" {self.stores[0].path}; find them together, interbert cluster-features"
                f" {self.stores[0].path} {store.path}"
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}

    @property
    def path(self) -> str:
        """Join the paths of all stores, for messages."""
        return ", ".join(str(store.path) for store in self.stores)

    @property
    def has_labels(self) -> bool:
        """Check whether all regions have class labels."""
        return bool(self.clusters) or all(
            "none" not in str(store.manifest.get("soft_labels", "")).split(" and ")
            for store in self.stores
        )

    @property
    def background_class(self) -> int | None:
        """Return the class that is no object; None for clusters and where all are objects."""
        return None if self.clusters else self.stores[0].manifest.get("background_class", 0)

    def add_texts(self, texts: TokenBatch, images: np.ndarray) -> None:
        """Number further texts about some of the images [n] after all captions."""
        self.added = texts
        self.num_captions += len(images)
        self.first_caption = np.append(self.first_caption, self.num_captions)
        self.caption_image = np.concatenate([self.caption_image, images])

    def caption(self, index: int) -> str:
        """Return the text of a caption."""
        store = int(np.searchsorted(self.first_caption, index, side="right")) - 1
        return self.stores[store].caption(index - int(self.first_caption[store]))

    def languages(self) -> np.ndarray:
        """Return the language tag of each caption of the stores, an object array of str."""
        return np.concatenate([store.languages() for store in self.stores])

    def tokens(self, captions: np.ndarray, tokenizer: CaptionTokenizer, longest: int) -> TokenBatch:
        """Return the first `longest` pieces of each of some captions [n], in their order.

        Pieces come from a store's token file if that was made with this tokeniser's vocabulary.
        """
        owner = np.searchsorted(self.first_caption, captions, side="right") - 1
        parts = []
        rows = []

        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            local = captions[mine] - self.first_caption[number]
            if number == len(self.stores):
                parts.append(self.added.take(local, longest))
            else:
                parts.append(self._tokens_of(self.stores[number], local, tokenizer, longest))
            rows.append(mine)

        if len(parts) == 1:
            return parts[0]

        return TokenBatch.join(parts).take(np.argsort(np.concatenate(rows)), longest)

    @staticmethod
    def _tokens_of(
        store: RegionStore, captions: np.ndarray, tokenizer: CaptionTokenizer, longest: int
    ) -> TokenBatch:
        if (
            store.captions.token_vocabulary == tokenizer.sha256
            and tokenizer.segmenter == "characters"
        ):
            return store.captions.tokens.take(captions, longest)

        return tokenizer.encode_batch([store.caption(int(c)) for c in captions]).take(
            np.arange(len(captions)), longest
        )

    def caption_bytes(self) -> np.ndarray:
        """Return the bytes of each caption, int32 [captions]: a free estimate of its tokens. Added
        texts count as five bytes a token.
        """
        parts = [np.diff(store.captions.offsets) for store in self.stores]
        if self.added is not None:
            parts.append(5 * np.diff(self.added.offsets))

        return np.concatenate(parts).astype(np.int32)

    def has_hard_negatives(self) -> bool:
        """Check whether any store has mined negatives; opens and checks the tables."""
        return any(table is not None for table in self._tables("hard_negatives"))

    def hard_negatives(self, caption: int) -> np.ndarray:
        """Return the hard negatives mined for a caption: caption numbers, int64 [<= K]."""
        return self._mined("hard_negatives", self.first_caption, caption)

    def has_hard_images(self) -> bool:
        """Check whether every store has mined neighbours of its images."""
        return all(table is not None for table in self._tables("hard_images"))

    def hard_images(self, image: int) -> np.ndarray:
        """Return the images whose mean features are nearest to an image's, int64 [<= K]."""
        return self._mined("hard_images", self.first_image, image)

    def _mined(self, kind: str, first: np.ndarray, number: int) -> np.ndarray:
        """Return a row of the stores' tables of one kind, in the corpus's numbers and without
        empty places; empty if the store has no such table.

        `first` holds the first number of each store.
        """
        store = int(np.searchsorted(first, number, side="right")) - 1
        table = self._tables(kind)[store] if store < len(self.stores) else None
        if table is None:
            return np.zeros(0, np.int64)

        row = np.asarray(table[number - first[store]], dtype=np.int64)

        return row[row >= 0] + first[store]

    def _tables(self, kind: str) -> list[np.ndarray | None]:
        if kind not in self._opened:
            self._opened[kind] = [getattr(store, kind)() for store in self.stores]
        return self._opened[kind]

    def read_batch(
        self, images: np.ndarray, offsets: np.ndarray, out: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Read the first regions of some images [B] into rows offsets[i] .. offsets[i + 1] - 1 of
        the arrays `out`; return the image sizes float32 [B, 2]. See RegionStore.read_batch.
        """
        starts = offsets[:-1]
        stops = offsets[1:]
        owner = np.searchsorted(self.first_image, images, side="right") - 1
        sizes = np.empty((len(images), 2), np.float32)

        for number in np.unique(owner):
            mine = owner == number
            local = images[mine] - self.first_image[number]
            sizes[mine] = self.stores[number].read_batch(
                local, starts[mine].tolist(), stops[mine].tolist(), out
            )

        return sizes

    def complain(self, image: int) -> None:
        """Read an image with every check; if it is bad, the UsageError names its file and what is
        wrong.
        """
        store = int(np.searchsorted(self.first_image, image, side="right")) - 1
        self.stores[store].read(image - int(self.first_image[store]))

    def cluster_labels(
        self, images: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the clusters of the first `counts` [B] regions of some images [B], as soft labels
        of one entry: class ids int32 [R, 1] and probabilities 1 [R, 1].
        """
        owner = np.searchsorted(self.first_image, images, side="right") - 1
        of_region = np.repeat(owner, counts)
        ids = np.empty((len(of_region), 1), np.int32)

        for number in np.unique(owner):
            mine = owner == number
            local = images[mine] - self.first_image[number]
            ids[of_region == number, 0] = self.clusters[number].of_images(local, counts[mine])

        return ids, np.ones(ids.shape, np.float32)

    def label_width(self) -> int:
        """Return the number of entries of a soft label; raise UsageError if the stores differ."""
        widths = {store.label_width() for store in self.stores}
        if len(widths) > 1:
            raise UsageError(
                f"--data-path {self.path}: soft labels with {', '.join(map(str, sorted(widths)))}"
                " entries; build all stores with the same --soft-labels"
            )

        return widths.pop()


def check_detector(expected: dict | None, found: dict | None, where: str, allowed: bool) -> None:
    """Raise UsageError if both detectors are known, differ, and this is not allowed: their features
    mean different things.
    """
    if expected and found and expected != found and not allowed:
        raise UsageError(
            f"{where}: features of {detector_text(found, expected)}, expected those of"
            f" {detector_text(expected, found)}; use features of the expected detector, or give"
            " --allow-other-detector"
        )


def detector_text(detector: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the name of a detector, with whatever else differs from another one in brackets."""
    differing = [
        f"{key} {entry_text(value, other.get(key))}"
        for key, value in detector.items()
        if key != "name" and other.get(key) != value
    ]
    name = str(detector.get("name", "a detector without a name"))

    return f"{name} ({', '.join(differing)})" if differing else name


def entry_text(value: Any, other: Any) -> str:
    """Return an entry of a detector beside that of another one: the detector that gave its boxes
    by its name, sizes in words, and long hashes cut short.
    """
    if not isinstance(value, dict):
        return str(value)[:MAX_ENTRY]

    if "name" in value:
        return detector_text(value, other if isinstance(other, dict) else {})

    return " and ".join(f"{key} {part}" for key, part in value.items())
