"""Build a region store from published region features and caption files, or from other stores.

    interbert build-features train2014_obj36.tsv --captions captions_train2014.json \\
        --output coco --vocab-file vocab.txt
    interbert build-features cc_store sbu_store --output both

Stores are joined, cut anew, or a part of them is taken (--only).

Features: base64 TSV (LXMERT, bottom-up attention), LMDB (ViLBERT, InterBERT), folders of npz, HDF5
(adaptive or fixed bottom-up attention), region stores. Captions: COCO and Karpathy JSON, Flickr30K
lines and token files, Conceptual Captions TSV, SBU JSON, MUGE and KDD Cup queries, plain TSV and
JSON lines. Stopped or killed, a build is resumable: give the same command again.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.preparation.building.build import BuildPlan, build
from megatron_interbert.preparation.building.captions import FORMATS as CAPTION_FORMATS
from megatron_interbert.preparation.building.sources.base import FeatureSource
from megatron_interbert.preparation.building.sources.fields import (
    BACKGROUND_FIRST,
    BACKGROUND_NONE,
    ReadOptions,
)
from megatron_interbert.preparation.building.sources.opening import FORMATS, open_features
from megatron_interbert.preparation.building.sources.stores import StoreSource
from megatron_interbert.reading import read_text

DETECTOR = "Faster R-CNN ResNet-101, Visual Genome"


@dataclass
class BuildingOptions(Flags):
    """What every command is told that builds a region store."""

    GROUP: ClassVar[str] = "store"

    output: str = option("", "folder of the new store", required=True)
    captions: list[str] = option((), "caption files", several=True, group="captions")
    vocab_file: str = option(
        "",
        "WordPiece vocabulary; copied into the store, and all captions tokenised with it",
        group="captions",
    )
    class_names: str = option(
        "", "detector classes without background, one a line; default: those of the detector"
    )
    images_per_shard: int = option(
        1024, "images of a shard, the unit of work that is kept", least=1
    )
    max_dropped: float = option(
        0.1, "share of unusable images that is allowed", least=0, most=1, group="work"
    )
    restart: bool = option(
        False,
        "throw away what an unfinished build has left and begin anew",
        group="work",
    )


@dataclass
class Options(BuildingOptions):
    """What is built from what."""

    GROUP: ClassVar[str] = "data"

    sources: list[str] = argument(
        "files or folders of features, in the order of the store", several=True
    )
    format: str = option("auto", "what SOURCES are; auto: by their content", FORMATS)
    columns: str = option(
        "",
        "names of a TSV's columns where their number does not tell:"
        " image_id,image_w,image_h,num_boxes,boxes,features and of labels objects_id,objects_conf"
        " or cls_prob; other names are passed over",
    )
    image_ids: str = option(
        "",
        "file that names the images of an HDF5 (imgid2idx as JSON or pickle, or one a line)",
    )
    only: str = option("", "file with the image ids to keep, one a line")
    class_ids: str = option(
        "",
        "whether class id 0 is background or the first object; default: the habit of the format",
        (BACKGROUND_FIRST, BACKGROUND_NONE),
    )
    box_format: str = option("xyxy", "of the boxes, in pixels", ("xyxy", "xywh", "yxyx"))
    num_classes: int = option(1601, "classes with background", least=1)
    trust_pickle: bool = option(
        False, "read pickles inside the input; only numbers, strings, arrays"
    )

    captions_format: str = option(
        "auto", "what the caption files are; auto: by content", CAPTION_FORMATS, group="captions"
    )
    split: str = option(
        "", "of a Karpathy file, comma-separated: train,restval; default: all", group="captions"
    )
    text_normalisation: str = option(
        "none",
        "that of the model (base-chinese: chinese), for which the captions are tokenised",
        ("none", "chinese"),
        group="captions",
    )

    soft_labels: int = option(
        0,
        "label entries kept for a region; default: 10, or those of the store",
        least=0,
        group="store",
    )
    detector: str = option("", f"recorded in the store; default: {DETECTOR}", group="store")
    detector_revision: str = option("", "recorded in the store", group="store")
    allow_other_detector: bool = option(False, "join stores of different detectors", group="store")
    strict_boxes: bool = option(
        False, "drop images with boxes outside instead of clipping these", group="store"
    )
    workers: int = option(os.cpu_count() or 1, "processes", least=1, group="work")


def detector_of(sources: list[FeatureSource], options: Options) -> dict[str, Any]:
    """Give what the sources say of their detector, else the flags."""
    known = [source.facts().detector for source in sources if isinstance(source, StoreSource)]
    for other in known:
        if other != known[0] and not options.allow_other_detector:
            raise UsageError(
                f"stores of different detectors, {known[0]} and {other}; join them with"
                " --allow-other-detector"
            )

    if known and (options.detector or options.detector_revision):
        raise UsageError(
            "--detector and --detector-revision are for published features; a region store knows"
            " its own"
        )

    if not known:
        return {"name": options.detector or DETECTOR, "revision": options.detector_revision}

    others = [detector for i, detector in enumerate(known) if detector not in known[:i]][1:]

    return {**known[0], **({"joined_with": others} if others else {})}


def vocabulary_of(sources: list[FeatureSource], options: Options) -> str:
    """Give the text of the vocabulary for the store: the one given, else the first of a source."""
    if options.vocab_file:
        CaptionTokenizer(options.vocab_file)  # before anything is written: is it one?
        return read_text(options.vocab_file, "--vocab-file")

    stores = [source.path for source in sources if isinstance(source, StoreSource)]
    files = [Path(path) / "vocab.txt" for path in stores]

    return next((read_text(file, "vocab.txt") for file in files if file.is_file()), "")


def plan_of(options: Options) -> BuildPlan:
    """Open the sources, and say what is to be built of them."""
    reading = ReadOptions(
        class_ids=options.class_ids,
        box_format=options.box_format,
        soft_labels=options.soft_labels or 10,
        num_classes=options.num_classes,
        trust_pickle=options.trust_pickle,
    )
    columns = tuple(filter(None, options.columns.split(",")))
    sources = [
        open_features(path, options.format, reading, columns, options.image_ids)
        for path in options.sources
    ]
    widths = [s.store.label_width() for s in sources if isinstance(s, StoreSource)]
    names: list[str] = []
    if options.class_names:
        names = ["background", *read_text(options.class_names, "--class-names").splitlines()]

    return BuildPlan(
        sources=sources,
        output=options.output,
        caption_files=list(options.captions),
        captions_format=options.captions_format,
        split=options.split,
        only=read_text(options.only, "--only").split("\n") if options.only else None,
        detector=detector_of(sources, options),
        class_names=names,
        soft_labels=options.soft_labels or max(widths, default=10),
        vocabulary=vocabulary_of(sources, options),
        text_normalisation=options.text_normalisation,
        images_per_shard=options.images_per_shard,
        strict_boxes=options.strict_boxes,
        options={
            "sources": list(options.sources),
            "reading": vars(reading),
            "columns": list(columns),
            "format": options.format,
            "image_ids": options.image_ids and file_sha256(options.image_ids),
        },
    )


def run(options: Options) -> None:
    """Write the store, and say what is in it."""
    plan = plan_of(options)
    started = time.monotonic()
    manifest = build(plan, options.workers, options.max_dropped, options.restart)
    report(options.output, manifest, time.monotonic() - started)


def report(output: str, manifest: dict[str, Any], seconds: float) -> None:
    """Say what is in the store and what is not."""
    counts = manifest["counts"]
    kinds = [f"{count} {kind}" for kind, count in manifest["images_by_label_kind"].items()]
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    print(
        f"{output}: {counts['images']} images (labels: {', '.join(kinds)}),"
        f" {counts['regions']} regions, {counts['captions']} captions"
    )
    print(
        f"{len(manifest['shards'])} shards, {size:.0f} MB, {seconds:.1f} s,"
        f" {manifest['repaired_boxes']} boxes clipped"
    )
    for reason, count in manifest["dropped"].items():
        print(f"dropped: {count} images, {reason}")
    if manifest["dropped"]:
        print(f"each is listed in {Path(output) / 'dropped.jsonl'}")
    if manifest["inverted_boxes"] > 0.05 * counts["regions"]:
        print(
            f"warning: {manifest['inverted_boxes']} of {counts['regions']} boxes were inverted;"
            " they look like x, y, width, height: --box-format xywh"
        )


def main() -> None:
    """Entry point."""
    run_command(Options, __doc__, run)
