"""Writing a region store: shards in a folder beside the target, which appears whole or not at all."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from megatron_interbert.data.store import (
    BOXES_AND_LABELS,
    CAPTIONS,
    MANIFEST,
    SCHEMA_VERSION,
    VOCABULARY,
    Regions,
    file_sha256,
    record_problem,
    repair_boxes,
)
from megatron_interbert.errors import UsageError


class RegionStoreWriter:
    """Collects images and their captions into shards; `finish` publishes the store. Use as a context manager.

    `soft_labels` says where class_probs come from: "dense", "top_k" or "top_1_confidence" (built from one confidence;
    the rest of the probability is taken as spread over the other classes). `vocabulary` is the text of a vocab.txt.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        feature_dim: int,
        num_classes: int,
        detector: dict[str, str],
        soft_labels: str,
        background_class: int | None = 0,
        class_names: Sequence[str] = (),
        images_per_shard: int = 1024,
        strict_boxes: bool = False,
        vocabulary: str = "",
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise UsageError(f"{path}: already exists; choose another folder or remove it")
        self.work = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.images_per_shard, self.strict_boxes = images_per_shard, strict_boxes
        if vocabulary:
            (self.work / VOCABULARY).write_text(vocabulary, encoding="utf-8")
        self.manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "feature_dim": feature_dim,
            "num_classes": num_classes,
            "background_class": background_class,
            "box_format": "xyxy pixels",
            "detector": detector,
            "soft_labels": soft_labels,
            "class_names": list(class_names),
            "repaired_boxes": 0,
            **(extra or {}),
            "shards": [],
        }
        self._pending: list[tuple[Regions, list[tuple[str, str]]]] = []
        self._texts: list[bytes] = []
        self._text_images: list[int] = []
        self._text_languages: list[str] = []
        self._images = 0

    def __enter__(self) -> "RegionStoreWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.finish()
        else:
            shutil.rmtree(self.work, ignore_errors=True)

    def add(self, regions: Regions, captions: Sequence[tuple[str, str]]) -> None:
        """Append one image with its captions [(text, language tag)]. UsageError names a record that is refused."""
        rows = len(regions.features)
        expected = {"features": (rows, self.manifest["feature_dim"]), "boxes": (rows, 4), "class_probs": regions.class_ids.shape}
        for name, shape in expected.items():
            if getattr(regions, name).shape != shape:
                raise UsageError(f"image {regions.image_id}: {name} has shape {getattr(regions, name).shape}, expected {shape}")
        if rows == 0:
            raise UsageError(f"image {regions.image_id}: no regions")
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite and is refused
            boxes = np.asarray(regions.boxes, dtype=np.float32)
            regions = dataclasses.replace(regions, features=regions.features.astype(np.float16), boxes=boxes)
        problem = record_problem(regions, self.manifest["num_classes"])
        if problem:
            raise UsageError(f"image {regions.image_id}: {problem}")
        regions.boxes, repaired = repair_boxes(boxes, regions.size)
        if repaired and self.strict_boxes:
            raise UsageError(f"image {regions.image_id}: {repaired} boxes outside the image or inverted")
        self.manifest["repaired_boxes"] += repaired
        for text, language in captions:
            self._texts.append(text.encode("utf-8"))
            self._text_images.append(self._images)
            self._text_languages.append(language)
        self._images += 1
        self._pending.append((regions, list(captions)))
        if len(self._pending) == self.images_per_shard:
            self._write_shard()

    def _write_shard(self) -> None:
        records, self._pending = self._pending, []
        ends = np.cumsum([len(r.features) for r, _ in records])
        columns = {
            "image_features": [r.features for r, _ in records],
            "image_bb": [r.boxes for r, _ in records],
            "class_ids": [r.class_ids for r, _ in records],
            "class_probs": [r.class_probs for r, _ in records],
        }
        path = self.work / f"shard-{len(self.manifest['shards']):05d}.h5"
        with h5py.File(path, "w") as file:
            for name, parts in columns.items():
                file[name] = np.concatenate(parts).astype(BOXES_AND_LABELS[name])  # contiguous: one image is one read
            file["pos_boxes"] = np.stack([np.r_[0, ends[:-1]], ends], axis=1).astype(np.int64)
            file["image_sizes"] = np.array([r.size for r, _ in records], dtype=np.float32)
            strings = h5py.string_dtype()
            file.create_dataset("image_ids", data=[r.image_id for r, _ in records], dtype=strings)
            texts = [(text, row) for row, (_, captions) in enumerate(records) for text, _ in captions]
            file.create_dataset("caption_text", data=[t for t, _ in texts], dtype=strings)
            file["caption_image"] = np.array([row for _, row in texts], dtype=np.int64)
        counts = {"images": len(records), "regions": int(ends[-1]), "captions": len(texts)}
        self.manifest["shards"].append({**_describe(path), **counts})

    def _write_captions(self) -> None:
        names = sorted(set(self._text_languages)) or [""]
        with h5py.File(self.work / CAPTIONS, "w") as file:
            file["text"] = np.frombuffer(b"".join(self._texts), dtype=np.uint8)
            file["offsets"] = np.cumsum([0] + [len(t) for t in self._texts]).astype(np.int64)
            file["image"] = np.array(self._text_images, dtype=np.int64)
            file["language"] = np.array([names.index(v) for v in self._text_languages], dtype=np.int16)
            file.attrs["languages"] = names

    def finish(self) -> None:
        """Write what is pending, the caption file and the manifest, then rename the folder into place."""
        if self._pending:
            self._write_shard()
        self._write_captions()
        totals = {k: sum(s[k] for s in self.manifest["shards"]) for k in ("images", "regions", "captions")}
        self.manifest |= {"counts": totals, "captions_file": _describe(self.work / CAPTIONS)}
        with open(self.work / MANIFEST, "w", encoding="utf-8") as handle:
            json.dump(self.manifest, handle, indent=1, ensure_ascii=False)
            handle.flush()
            os.fsync(handle.fileno())
        os.rename(self.work, self.path)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
