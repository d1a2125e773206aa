"""Provide what generated worlds share: a simulated detector, and stores that are marked as
generated.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_interbert.data.manifest import (
    CENTROIDS,
    CLUSTERS,
    HARD_IMAGES,
    HARD_NEGATIVES,
    MANIFEST,
)
from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import UsageError
from megatron_interbert.files import publish_folder
from megatron_interbert.preparation.building.store_writer import STORE_FILES, RegionStoreWriter
from megatron_interbert.preparation.work_folder import refuse_link, refuse_strangers, remove_folder
from megatron_interbert.reading import read_json

FEATURES = 64
SOFT_LABELS = 5
PICTURES = "pictures"  # folder in the store of a shop
OF_SHOPS = tuple(f"{name}.jsonl" for name in ("items", "queries", "topics", "clicks"))
MINED = (HARD_NEGATIVES, HARD_IMAGES, CLUSTERS, CENTROIDS)
HALF_WRITTEN = (
    *(f"{name}{end}" for name in OF_SHOPS for end in (".[0-9]*.new", ".partial")),
    f"{HARD_IMAGES}.[0-9]*.new",
    "hard_images.[0-9]*.new",  # its name in earlier versions
)
OURS = (*HALF_WRITTEN, *OF_SHOPS, *MINED, *STORE_FILES)
PICTURE = "*-[0-9]*.png"


class Detector:
    """Simulate a detector: noisy features, overlapping boxes, and soft labels that confuse similar
    classes.
    """

    def __init__(self, prototypes: np.ndarray, noise: float) -> None:
        """Take the prototypes [classes, FEATURES] of all classes except background."""
        self.noise = noise
        distance = np.linalg.norm(prototypes[:, None] - prototypes[None], axis=2)
        self.neighbours = np.argsort(distance, axis=1)[:, :SOFT_LABELS]  # itself first

    def detect(
        self,
        random: np.random.Generator,
        name: str,
        size: tuple[int, int],
        classes: np.ndarray,
        features: np.ndarray,
        boxes: np.ndarray,
        attributes: np.ndarray | None = None,
    ) -> Regions:
        """Draw one or two overlapping regions for each thing (classes [n], features [n, FEATURES],
        boxes [n, 4] in pixels, perhaps attributes [n]), most confident first.
        """
        owner = np.repeat(np.arange(len(classes)), random.integers(1, 3, size=len(classes)))
        extent = np.tile(boxes[owner, 2:] - boxes[owner, :2], 2)
        jittered = boxes[owner] + random.normal(scale=0.08, size=(len(owner), 4)) * extent
        seen = features[owner] + random.normal(scale=self.noise, size=(len(owner), FEATURES))
        confidence = random.uniform(0.4, 0.95, size=len(owner))
        near = (
            random.dirichlet(np.ones(SOFT_LABELS), size=len(owner))
            * (1 - confidence)[:, None]
            * 0.9
        )
        near[:, 0] += confidence
        order = np.argsort(-confidence)

        found = Regions(
            name,
            size,
            seen[order].astype(np.float16),
            jittered[order].astype(np.float32),
            self.neighbours[classes[owner]][order] + 1,
            near[order].astype(np.float32),
        )
        if attributes is not None:
            found.attribute_ids = attributes[owner][order].astype(np.int32)[:, None]
            found.attribute_probs = confidence[order].astype(np.float32)[:, None]

        return found


@contextlib.contextmanager
def generated_store(
    path: Path,
    seed: int,
    class_names: Sequence[str],
    vocabulary: Sequence[str],
    text_normalisation: str = "none",
    num_attributes: int = 0,
) -> Iterator[RegionStoreWriter]:
    """Yield the writer of a generated store, which replaces the one at `path` once it is complete.

    Raises UsageError if `path` holds anything except a generated store.
    """
    beside = path.with_name(f"{path.name}.new")
    if path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(f"{path}: exists and is not a generated corpus; choose another --output")
    if path.exists() and not read_json(path / MANIFEST, str(path)).get("generated"):
        raise UsageError(
            f"{path}: holds a region store that was not generated; choose another --output"
        )

    for store in (path, beside):
        refuse_link(store)
        refuse_strangers(store, (*OURS, f"{PICTURES}/"))
        refuse_link(store / PICTURES)
        refuse_strangers(store / PICTURES, (PICTURE,))

    remove_generated(beside)
    with RegionStoreWriter(
        beside,
        feature_dim=FEATURES,
        num_classes=len(class_names) + 1,
        class_names=["background", *class_names],
        detector={"name": "generated world", "revision": f"seed {seed}"},
        soft_labels="top_k",
        vocabulary="\n".join(vocabulary) + "\n",
        extra={
            "generated": True,
            "text_normalisation": text_normalisation,
            "num_attributes": num_attributes,
        },
        images_per_shard=2048,
    ) as writer:
        yield writer

    replace_generated(path, beside)


def replace_generated(path: Path, beside: Path) -> None:
    """Put the new store `beside` at `path`, then remove the old one.

    Hidden files that operating systems leave (.DS_Store, .nfs..) stay, in a folder PATH.old-TIME.
    """
    old = path.with_name(f"{path.name}.old-{time.time_ns()}")
    if path.exists():
        path.rename(old)

    publish_folder(beside, path)
    if old.exists():
        remove_generated(old)


def remove_generated(path: Path) -> None:
    """Remove a generated store, if there is one."""
    if (path / PICTURES).is_dir():
        remove_folder(path / PICTURES, (PICTURE,))
    remove_folder(path, OURS)
