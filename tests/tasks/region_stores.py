"""Make region stores of annotated and detected boxes, and judge what is chosen among them."""

import numpy as np

from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.two_stores import TwoStores
from tests.corpus import VOCABULARY
from tests.tasks.test_vcr import write_regions

SIZE = (100.0, 80.0)


def write_two_stores(folder):
    """Write stores of annotated and detected regions of six images."""
    names = [f"COCO_train2014_{number:012d}" for number in range(1, 7)]
    counts = dict(zip(names, (3, 4, 2, 5, 3, 2), strict=True))
    annotated = write_regions(folder / "annotated", counts)
    detected = write_regions(folder / "detected", {n: c + 2 for n, c in counts.items()}, seed=1)
    return TwoStores(annotated, detected, 8)


def open_words(folder):
    """Open the vocabulary of the random stores."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return CaptionTokenizer(str(path))


def boxes_of(stores, image):
    """Return the annotated boxes of an image in pixels."""
    return stores.annotated.stores[0].read(image).boxes


def figures(task, record, ranked, convention="plain"):
    """Return the figures of one sample."""
    records = Records("f", [record], np.zeros((1, 1), np.int64))
    return task.figures_of(records, [ranked], convention)
