"""Inspect a region store: one pass over its images, then verdicts on what is wrong, where, and how
to fix it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_interbert.data.manifest import files_of, sha256_of
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.inspection.boxes import BoxFormat
from megatron_interbert.preparation.inspection.class_ids import ClassShift
from megatron_interbert.preparation.inspection.counts import Counts
from megatron_interbert.preparation.inspection.findings import Report
from megatron_interbert.preparation.inspection.layout import (
    describe_shards,
    measure_reads,
    slow_reasons,
)
from megatron_interbert.preparation.inspection.verdicts import judge
from megatron_interbert.progress import progress

FACTS = (
    "schema_version",
    "detector",
    "soft_labels",
    "box_format",
    "feature_dim",
    "num_classes",
    "background_class",
    "generated",
)
TOP_CLASSES = 20


@dataclass(frozen=True)
class InspectionOptions:
    """Hold the options of an inspection.

    max_images: inspect so many, evenly spread (None: all). class_names: by class id, instead of the
    store's own.
    """

    max_images: int | None = None
    verify_hashes: bool = False
    class_names: Sequence[str] | None = None


class CaptionsOfImages:
    """Look up the captions of an image, in a store that lists the image of each caption."""

    def __init__(self, store: RegionStore) -> None:
        self.store = store
        self.languages = store.languages()
        self.order = np.argsort(store.caption_image, kind="stable")
        self.first = np.searchsorted(
            store.caption_image[self.order], np.arange(store.num_images + 1)
        )

    def numbers(self, image: int) -> list[int]:
        """Return the numbers of an image's captions."""
        return self.order[self.first[image] : self.first[image + 1]].tolist()

    def read(self, image: int) -> list[tuple[str, str]]:
        """Read (text, language) of an image's captions; raise UsageError if one is not UTF-8."""
        return [
            (self.store.caption(number), str(self.languages[number]))
            for number in self.numbers(image)
        ]


class Inspector:
    """Make one pass over the images of a store, and hold all sums."""

    def __init__(self, store: RegionStore, options: InspectionOptions) -> None:
        self.store = store
        self.options = options
        self.names = list(
            options.class_names
            if options.class_names is not None
            else store.manifest.get("class_names") or []
        )
        background = store.manifest.get("background_class")
        self.counts = Counts(store.num_classes, background)
        self.shift = ClassShift(self.names, store.num_classes, background)
        self.boxes = BoxFormat()
        self.captions = CaptionsOfImages(store)
        self.readable: list[int] = []
        most = (
            store.num_images
            if options.max_images is None
            else min(options.max_images, store.num_images)
        )

        self.chosen = (
            range(most)
            if most == store.num_images
            else np.unique(np.linspace(0, store.num_images - 1, most, dtype=int))
        )

    def look(self) -> None:
        """Read all chosen images and their captions; bad records become findings."""
        keep = max(len(self.chosen) // 256, 1)
        for place, number in enumerate(progress(self.chosen, desc="inspect", unit="image")):
            if self._look_at(int(number)) and place % keep == 0:
                self.readable.append(int(number))

    def _look_at(self, number: int) -> bool:
        english = self._captions(number)
        try:
            regions = self.store.read(number)
            where = self.place(number)
        except UsageError as error:
            self.counts.find("unreadable", str(error))
            return False

        labels, sure = self.counts.add_image(number, regions, where)
        heights = regions.boxes[:, 1::2].mean(axis=1) / regions.size[1]
        self.shift.add(labels[sure], heights[sure], english)
        self.boxes.add(regions.boxes, regions.size)

        return True

    def _captions(self, number: int) -> list[str]:
        where = f"image {number}"
        try:
            captions = self.captions.read(number)
        except UsageError as error:
            self.counts.find("unreadable_captions", f"{where}: {error}")
            return []

        self.counts.find("without_captions", where, not captions)

        return self.counts.add_captions(captions, where)

    def place(self, number: int) -> str:
        """Describe an image for people: shard, number in it and name."""
        shard, row = self.store.locate(number)
        return f"{self.store.shards[shard]['file']}: image {row} ({self.store.image_id(number)})"

    def wrong_hashes(self) -> Iterator[str]:
        """Yield the names of files whose sha256 differs from the manifest."""
        for entry in progress(files_of(self.store.manifest), desc="hashes", unit="file"):
            if sha256_of(self.store.path, entry) != entry["sha256"]:
                yield entry["file"]

    def repeated_images(self) -> tuple[int, list[str]]:
        """Return how many images have the features of an earlier one, and describe the first
        pairs.
        """
        count, pairs = self.counts.repeated_images()
        return count, [f"{self.place(second)} as {self.place(first)}" for second, first in pairs]

    def inverted_share(self) -> float | None:
        """Return the share of boxes that were inverted when the store was built; None if it was not
        recorded.
        """
        inverted = self.store.manifest.get("inverted_boxes")
        regions = sum(shard["regions"] for shard in self.store.shards)

        return round(inverted / regions, 4) if isinstance(inverted, int) and regions else None


def inspect_store(store: RegionStore, options: InspectionOptions) -> Report:
    """Inspect a store and return the report; bad records are findings and do not stop it."""
    inspector = Inspector(store, options)
    inspector.look()
    counts = inspector.counts
    shards = describe_shards(store)
    slow = {
        shard["file"]: reasons
        for shard in shards
        if "datasets" in shard and (reasons := slow_reasons(shard))
    }

    report = Report(
        store=str(store.path),
        facts=_facts(store.manifest),
        counts=_counts(inspector),
        shards=shards,
        histograms=_histograms(counts),
        classes=_classes(counts, inspector.names),
        class_shift=inspector.shift.result(),
        box_format=inspector.boxes.result(inspector.inverted_share()),
        layout={"slow": slow, "measured": measure_reads(store)},
        verdicts=[],
        class_names=inspector.names,
        readable=inspector.readable,
    )
    hashes = list(inspector.wrong_hashes()) if options.verify_hashes else None
    report.verdicts = judge(report, counts.findings, inspector.repeated_images(), hashes)

    return report


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    clusters = manifest.get("clusters")
    return {
        **{name: manifest[name] for name in FACTS if name in manifest},
        **({"clusters": clusters["count"]} if clusters else {}),
    }


def _counts(inspector: Inspector) -> dict[str, Any]:
    store = inspector.store
    counts = inspector.counts
    manifest = store.manifest

    return {
        "images": store.num_images,
        "regions": sum(shard["regions"] for shard in store.shards),
        "captions": store.num_captions,
        "inspected": {
            "images": len(inspector.chosen),
            "read": counts.images,
            "regions": counts.regions,
            "captions": counts.captions,
        },
        "languages": counts.languages,
        "repaired_when_built": manifest.get("repaired_boxes"),
        "inverted_when_built": manifest.get("inverted_boxes"),
        "repaired_when_read": store.repaired_boxes,
        "images_left_out": manifest.get("dropped") or {},
        "captions_left_out": manifest.get("captions_left_out") or {},
        "repeated_texts": counts.repeated_texts(),
        "unlabelled_regions": counts.unlabelled,
    }


def _histograms(counts: Counts) -> dict[str, Any]:
    return {
        "regions_per_image": counts.regions_per_image.summary(),
        "caption_words": counts.words.summary(),
        "caption_characters": counts.characters.summary(),
        "box_areas": counts.area_summary(),
    }


def _classes(counts: Counts, names: Sequence[str]) -> dict[str, Any]:
    order = np.argsort(-counts.classes, kind="stable")[:TOP_CLASSES].tolist()
    labelled = int(counts.classes.sum())
    objects = np.delete(counts.classes, [] if counts.background is None else counts.background)

    return {
        "top": [
            {"id": k, "name": names[k] if k < len(names) else "", "regions": int(counts.classes[k])}
            for k in order
            if counts.classes[k]
        ],
        "never_seen": int((objects == 0).sum()),
        "of": len(objects),
        "background_share": round(counts.background_on_top / labelled, 4) if labelled else None,
        "background_is_commonest": bool(labelled and order[0] == counts.background),
        "mean_probability": round(counts.probability / labelled, 4) if labelled else None,
        "least_probability": round(counts.least_probability, 4) if labelled else None,
    }
