"""Write a region store from one process: shards go into a folder beside the target, which appears
complete or not at all.

`build.py` does the same with several processes and can be resumed after a kill; both write the
files through `shard_writer.py`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.manifest import (
    CAPTIONS,
    MANIFEST,
    PLAN,
    SCHEMA_VERSION,
    TOKENS,
    VOCABULARY,
)
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import (
    encoded,
    json_text,
    own_name,
    publish_folder,
    whole_file,
    write_text,
)
from megatron_interbert.preparation.building.shard_writer import (
    SHARD_NAME,
    Caption,
    prepare_record,
    write_caption_file,
    write_shard,
    write_token_file,
)
from megatron_interbert.preparation.work_folder import (
    lock_folder,
    refuse_link,
    refuse_strangers,
    remove_folder,
    remove_own,
)
from megatron_interbert.progress import progress

# The files of a store, in the order of removal: the manifest, which describes the rest, last.
STORE_FILES = ("shard-[0-9]*.h5", CAPTIONS, TOKENS, VOCABULARY, MANIFEST)
UNFINISHED = tuple(f"{name}{end}" for name in STORE_FILES for end in (".[0-9]*.new", ".partial"))
OURS = (*UNFINISHED, *STORE_FILES)


def new_manifest(
    *,
    feature_dim: int,
    num_classes: int,
    detector: dict[str, Any],
    soft_labels: str,
    background_class: int | None = 0,
    class_names: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Build the manifest of a store with what is known before its first image."""
    return {
        "schema_version": SCHEMA_VERSION,
        "feature_dim": feature_dim,
        "num_classes": num_classes,
        "background_class": background_class,
        "box_format": "xyxy pixels",
        "detector": detector,
        "soft_labels": soft_labels,
        "class_names": list(class_names),
        "repaired_boxes": 0,  # boxes clipped or sorted while writing
        # those whose second corner came before the first: a sign of x, y, w, h
        "inverted_boxes": 0,
        **more,
        "shards": [],
    }


def finish_store(folder: Path, manifest: dict[str, Any], vocabulary: str = "") -> None:
    """Complete a folder that holds all shards: write the caption file, the vocabulary with the
    captions' tokens if given, and the manifest.
    """
    shards = manifest["shards"]
    manifest["counts"] = {
        kind: sum(shard[kind] for shard in shards) for kind in ("images", "regions", "captions")
    }
    if not shards:
        raise UsageError(f"{folder}: holds no images, expected at least one to make a store")
    with Hdf5File(folder / shards[0]["file"]) as first:
        manifest["label_width"] = first["class_ids"].shape[1]

    manifest["captions_file"] = write_caption_file(folder, shards)
    if vocabulary:
        write_text(folder / VOCABULARY, vocabulary)
        tokenizer = CaptionTokenizer(
            str(folder / VOCABULARY), manifest.get("text_normalisation", "none")
        )
        manifest["tokens_file"] = write_token_file(
            folder, _texts(folder, shards), manifest["counts"]["captions"], tokenizer
        )
    else:
        for name in (VOCABULARY, TOKENS):
            (folder / name).unlink(missing_ok=True)

    path = folder / MANIFEST
    with whole_file(path, own_name(path)) as handle:
        handle.write(encoded(json_text(manifest)))


def _texts(folder: Path, shards: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for shard in progress(shards, unit="shard", desc="tokenising"):
        with Hdf5File(folder / shard["file"]) as file:
            yield file.strings("caption_text").tolist()


class RegionStoreWriter:
    """Collect images and their captions into shards; leaving the context manager without an error
    publishes the store.

    `soft_labels` says where class_probs come from: "dense", "top_k", "top_1_confidence" (built from
    one confidence; the remaining probability counts as spread over the other classes) or "none".
    `vocabulary` is the text of a vocab.txt.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images_per_shard: int = 1024,
        strict_boxes: bool = False,
        vocabulary: str = "",
        extra: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        self.path = Path(path)
        if os.path.lexists(self.path):
            raise UsageError(f"{path}: already exists; choose another folder or remove it")

        self.manifest = new_manifest(**facts, **(extra or {}))
        self.work = self.path.with_name(self.path.name + ".partial")
        refuse_link(self.work)

        if (self.work / PLAN).exists():
            raise UsageError(
                f"{self.work}: is an unfinished build; finish it, remove it or choose another"
                " folder"
            )

        refuse_strangers(self.work, OURS)
        self._lock = lock_folder(
            self.work, "another process is writing there; wait for it or choose another folder"
        )
        remove_own(self.work, OURS)
        self.images_per_shard = images_per_shard
        self.strict_boxes = strict_boxes
        self.vocabulary = vocabulary
        self._pending: list[tuple[Regions, list[Caption]]] = []
        self._label_width = 0

    def __enter__(self) -> "RegionStoreWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            remove_folder(self.work, OURS)
            os.close(self._lock)

    def add(self, regions: Regions, captions: Sequence[Caption]) -> None:
        """Add one image and its captions as (text, language tag).

        Raises UsageError naming the image if it cannot be stored.
        """
        facts = self.manifest
        ready = prepare_record(
            regions,
            facts["feature_dim"],
            facts["num_classes"],
            facts.get("num_attributes", 0),
        )
        if ready.problem:
            raise UsageError(
                f"image {regions.image_id}:"
                f" {'; '.join(filter(None, (ready.problem, ready.details)))}"
            )

        if ready.repaired and self.strict_boxes:
            raise UsageError(
                f"image {regions.image_id}: {ready.repaired} boxes outside the image or inverted"
            )

        width = ready.regions.class_ids.shape[1]
        if width != (self._label_width or width):
            raise UsageError(
                f"image {regions.image_id}: soft labels with {width} entries, expected"
                f" {self._label_width} as in the images before"
            )

        self._label_width = width
        self.manifest["repaired_boxes"] += ready.repaired
        self.manifest["inverted_boxes"] += ready.inverted
        self._pending.append((ready.regions, list(captions)))
        if len(self._pending) == self.images_per_shard:
            self._write_shard()

    def _write_shard(self) -> None:
        records = self._pending
        self._pending = []
        self.manifest["shards"].append(
            write_shard(self.work / SHARD_NAME.format(len(self.manifest["shards"])), records)
        )

    def _finish(self) -> None:
        if self._pending:
            self._write_shard()
        finish_store(self.work, self.manifest, self.vocabulary)
        publish_folder(self.work, self.path)
