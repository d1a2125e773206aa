"""Read the regions of several images end to end, straight into the memory of a batch, and check
them all at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.masking import box_area, within
from megatron_interbert.data.regions import MOST_PROBABILITY, attributes_fit
from megatron_interbert.data.shard_file import ATTRIBUTES, COLUMNS

# shape -> float16 memory for the features of a batch
Allocate = Callable[[tuple[int, int]], np.ndarray]


def plain_memory(shape: tuple[int, int]) -> np.ndarray:
    """Allocate uninitialised memory for features, float16."""
    return np.empty(shape, np.float16)


@dataclass
class RegionBatch:
    """Hold R regions of B images: features float16 [R, F], boxes [R, 4] in pixels, inside their
    images, soft labels [R, k], sizes (w, h) [B, 2], offsets [B + 1]; attributes [R, 1] and their
    probabilities if they were asked for.
    """

    features: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    class_probs: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    attribute_ids: np.ndarray | None = None
    attribute_probs: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """Return the number of regions of each image, int64 [B]."""
        return np.diff(self.offsets)

    def locations(self) -> np.ndarray:
        """Compute x1/W, y1/H, x2/W, y2/H and the share of the area, float32 [R, 5]."""
        owner, _ = within(self.offsets)
        unit = self.boxes / np.tile(self.sizes, 2)[owner]
        return np.concatenate([unit, box_area(unit)[:, None]], axis=1)


def read_regions(
    corpus: Corpus,
    images: np.ndarray,
    most: int,
    allocate: Allocate = plain_memory,
    attributes: bool = False,
) -> RegionBatch:
    """Read the first `most` regions of some images [B], with their attributes if asked.

    Raises UsageError naming the file and what is wrong with a record.
    """
    offsets = np.concatenate(
        [[0], np.cumsum(np.minimum(corpus.region_counts[images], most).astype(np.int64))]
    )
    total = int(offsets[-1])
    labels = corpus.label_width()
    widths = {"image_bb": 4, "class_ids": labels, "class_probs": labels}
    rows = {"image_features": allocate((total, corpus.feature_dim))}
    rows |= {name: np.empty((total, width), COLUMNS[name]) for name, width in widths.items()}
    if attributes:
        rows |= {name: np.empty((total, 1), dtype) for name, dtype in ATTRIBUTES.items()}

    sizes = corpus.read_batch(images, offsets, list(rows.values()))
    features, boxes, class_ids, class_probs, *of_attributes = rows.values()
    if attributes and not attributes_fit(*of_attributes, corpus.num_attributes):
        for image in images.tolist():
            corpus.complain(image)
    if corpus.clusters:
        class_ids, class_probs = corpus.cluster_labels(images, np.diff(offsets))
    boxes = _checked_boxes(corpus, images, boxes, class_ids, class_probs, sizes, offsets)

    return RegionBatch(features, boxes, class_ids, class_probs, sizes, offsets, *of_attributes)


def _checked_boxes(
    corpus: Corpus,
    images: np.ndarray,
    boxes: np.ndarray,
    ids: np.ndarray,
    probs: np.ndarray,
    sizes: np.ndarray,
    offsets: np.ndarray,
) -> np.ndarray:
    """Return boxes [R, 4] with sorted corners, clipped to their images.

    Raises UsageError for a record with bad boxes, sizes or labels.
    """
    owner, _ = within(offsets)
    bound = np.tile(sizes, 2)[owner]

    with np.errstate(invalid="ignore", over="ignore"):
        low = np.minimum(boxes[:, :2], boxes[:, 2:])
        high = np.maximum(boxes[:, :2], boxes[:, 2:])
        fixed = np.clip(np.concatenate([low, high], axis=1), 0, bound)
        # Minima and sums of the whole batch carry NaN and infinity on, at one pass each.
        whole = (
            sizes.min() > 0
            and np.isfinite(sizes.sum(dtype=np.float64))
            and np.isfinite(boxes.sum(dtype=np.float64))
        )
        whole = whole and ids.min() >= 0 and ids.max() < corpus.num_classes
        whole = (
            whole
            and probs.min() >= 0
            and (probs @ np.ones(probs.shape[1], np.float32)).max() <= MOST_PROBABILITY
        )

    if not whole or (corpus.strict_boxes and (fixed != boxes).any()):
        for image in images.tolist():
            corpus.complain(image)

    return fixed
