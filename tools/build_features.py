#!/usr/bin/env python3
"""Turns a folder of npz region features and a captions.jsonl into a region store.

Each npz (no pickles inside) holds image_id, image_w, image_h, boxes [R, 4] x1 y1 x2 y2 in pixels, features [R, F], and either
cls_prob [R, C] (whole class distributions) or the detector's top class and confidence: cls_id_1601 (background is class 0)
and cls_conf. Captions are lines of JSON with image_id, caption and, if known, lang.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.config import read_text
from megatron_interbert.data.store import Regions
from megatron_interbert.data.store_writer import RegionStoreWriter
from megatron_interbert.errors import UsageError, run_entry


def read_captions(path: str) -> dict[str, list[tuple[str, str]]]:
    """image_id -> [(caption, language)]; UsageError names the line that cannot be read."""
    captions: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(read_text(path, "--captions").splitlines(), 1):
        try:
            record = json.loads(line)
            captions.setdefault(str(record["image_id"]), []).append((record["caption"], record.get("lang", "")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: line {number} is not a caption record with image_id and caption ({error})") from error
    return captions


def read_image(path: Path, soft_labels: int, num_classes: int) -> tuple[Regions, bool]:
    """One npz as Regions with top-k labels, and whether whole distributions were there."""
    try:
        with np.load(path, allow_pickle=False) as data:
            fields = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not a readable npz without pickles ({error})") from error
    for name in ("image_id", "image_w", "image_h", "boxes", "features"):
        if name not in fields:
            raise UsageError(f"{path}: '{name}' is missing, found {', '.join(sorted(fields))}")
    rows = len(fields["features"])
    dense = "cls_prob" in fields
    if dense:
        if fields["cls_prob"].shape != (rows, num_classes):
            raise UsageError(f"{path}: cls_prob has shape {fields['cls_prob'].shape}, expected {(rows, num_classes)}")
        ids = np.argsort(-fields["cls_prob"], axis=1, kind="stable")[:, :soft_labels]
        probs = np.take_along_axis(fields["cls_prob"], ids, axis=1)
    elif {"cls_id_1601", "cls_conf"} <= set(fields):
        # One class is known; the other entries of the row are other classes with no stated probability.
        first = fields["cls_id_1601"].astype(np.int64)[:, None]
        ids = (first + np.arange(soft_labels)) % num_classes
        probs = np.zeros((rows, soft_labels), dtype=np.float32)
        probs[:, 0] = fields["cls_conf"]
        share = (1.0 - probs[:, :1]) / (num_classes - 1)
        probs[:, 1:] = share
    else:
        raise UsageError(f"{path}: neither cls_prob nor cls_id_1601 with cls_conf, so there is no region label")
    size = (float(fields["image_w"]), float(fields["image_h"]))
    features = np.asarray(fields["features"], dtype=np.float32)
    return Regions(str(fields["image_id"]), size, features, fields["boxes"], ids, probs.astype(np.float32)), dense


def run() -> None:
    """Parse the command line and write the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", required=True, help="folder of npz files, one an image")
    parser.add_argument("--captions", required=True, help="captions.jsonl")
    parser.add_argument("--output", required=True, help="folder of the new store")
    parser.add_argument("--vocab-file", help="WordPiece vocabulary, copied into the store as vocab.txt")
    parser.add_argument("--class-names", help="detector classes without background, one a line")
    parser.add_argument("--num-classes", type=int, default=1601, help="with background (default: %(default)s)")
    parser.add_argument("--soft-labels", type=int, default=10, help="label entries kept for a region (default: %(default)s)")
    parser.add_argument("--detector", default="Faster R-CNN ResNet-101, Visual Genome", help="recorded in the manifest")
    parser.add_argument("--images-per-shard", type=int, default=1024)
    parser.add_argument("--strict-boxes", action="store_true", help="refuse boxes outside the image instead of clipping them")
    options = parser.parse_args()
    files = sorted(Path(options.npz).glob("*.npz"))
    if not files:
        raise UsageError(f"--npz {options.npz}: no .npz files there")
    captions = read_captions(options.captions)
    names = ["background", *read_text(options.class_names, "--class-names").split("\n")] if options.class_names else []
    first, _ = read_image(files[0], options.soft_labels, options.num_classes)
    whole = skipped = 0
    with RegionStoreWriter(
        options.output,
        feature_dim=first.features.shape[1],
        num_classes=options.num_classes,
        class_names=names[: options.num_classes],
        detector={"name": options.detector, "revision": ""},
        soft_labels="top_k, or built from the top confidence",
        images_per_shard=options.images_per_shard,
        strict_boxes=options.strict_boxes,
        vocabulary=read_text(options.vocab_file, "--vocab-file") if options.vocab_file else "",
    ) as writer:
        for file in tqdm(files, unit="image", mininterval=1.0, disable=None):
            regions, dense = read_image(file, options.soft_labels, options.num_classes)
            if regions.image_id not in captions:
                skipped += 1
                continue
            writer.add(regions, captions[regions.image_id])
            whole += dense
        if skipped == len(files):
            raise UsageError(
                f"none of the {len(files)} images of {options.npz} has a caption in {options.captions}: image_id differs"
            )
        writer.manifest["images_with_whole_distributions"] = whole
    print(
        f"{options.output}: {len(files) - skipped} images ({whole} with whole class distributions), {skipped} without caption skipped,"
        f" {writer.manifest['counts']['captions']} captions, {writer.manifest['repaired_boxes']} boxes clipped"
    )


if __name__ == "__main__":
    run_entry(run)
