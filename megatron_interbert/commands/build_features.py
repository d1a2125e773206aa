"""Build a region store from published region features and caption files, or from other stores.

    interbert build-features train2014_obj36.tsv --captions captions_train2014.json \\
        --output coco --vocab-file vocab.txt
    interbert build-features cc_store sbu_store --output both

Stores can be joined, cut into other shards, or reduced to some of their images (--only).

Features: TSV (LXMERT, bottom-up attention, VinVL), LMDB (ViLBERT, InterBERT, UNITER, volta, mmf),
folders of npz or npy, HDF5 (bottom-up attention, GQA, volta, ..), region stores. Captions: COCO and
Karpathy JSON, Flickr30K lines and token files, Conceptual Captions TSV, SBU JSON, MUGE and KDD Cup
queries, plain TSV and JSON lines. A build that was stopped or killed is resumable: run the same
command again.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.commands.shared_work import SharedWorkOptions
from megatron_interbert.config.options import argument, option, redefault
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.captions.reading import FORMATS as CAPTION_FORMATS
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.base import FeatureSource
from megatron_interbert.preparation.building.sources.fields import (
    BACKGROUND_FIRST,
    BACKGROUND_NONE,
    ReadOptions,
)
from megatron_interbert.preparation.building.sources.opening import FORMATS, open_features
from megatron_interbert.preparation.building.sources.records import RecordSource
from megatron_interbert.preparation.building.sources.stores import StoreSource
from megatron_interbert.preparation.sharing import read_team
from megatron_interbert.reading import read_text

DETECTOR = "Faster R-CNN ResNet-101, Visual Genome"


@dataclass
class BuildingOptions(SharedWorkOptions):
    """Hold the flags of every command that builds a region store."""

    GROUP: ClassVar[str] = "store"

    output: str = option("", "folder of the new store", required=True)
    captions: list[str] = option((), "caption files", several=True, group="captions")
    vocab_file: str = option(
        "",
        "WordPiece vocabulary; it is copied into the store and tokenises all captions",
        group="captions",
    )
    class_names: str = option(
        "", "file of detector classes without background, one a line; default: the detector's"
    )
    images_per_shard: int = option(
        1024, "images per shard, the unit of work that survives a stop", least=1
    )
    max_dropped: float = option(
        0.1, "largest allowed share of unusable images", least=0, most=1, group="work"
    )


@dataclass
class Options(BuildingOptions):
    """Hold the flags of build-features."""

    GROUP: ClassVar[str] = "data"

    sources: list[str] = argument(
        "files or folders of features, in the order of the store", several=True
    )
    format: str = option("auto", "format of SOURCES; auto: by their content", FORMATS)
    columns: str = option(
        "",
        "names of a TSV's columns if their number does not tell:"
        " image_id,image_w,image_h,num_boxes,boxes,features and for labels objects_id,objects_conf"
        " or cls_prob; other names are ignored",
    )
    image_ids: str = option(
        "",
        "file that names the images of an HDF5 (imgid2idx as JSON or pickle, or one a line)",
    )
    image_sizes: str = option(
        "",
        "file with width and height of the images if SOURCES have none: hw.tsv, COCO's JSON, or id"
        " -> {width, height}",
    )
    only: str = option("", "file with the image ids to keep, one a line")
    class_ids: str = option(
        "",
        "whether class id 0 is background or the first object; default: the format's convention",
        (BACKGROUND_FIRST, BACKGROUND_NONE),
    )
    box_format: str = option(
        "xyxy",
        "order of coordinates; pixels or shares of the image are told apart",
        ("xyxy", "xywh", "yxyx"),
    )
    num_classes: int = option(1601, "classes, background included", least=1)
    num_attributes: int = option(
        400, "attributes that regions may have, if SOURCES give some (LXMERT)", least=1
    )
    trust_pickle: bool = option(
        False, "read pickles inside the input, limited to numbers, strings and arrays"
    )

    captions: list[str] = redefault(
        BuildingOptions,
        "captions",
        (),
        "caption files; without them, captions of the sources are kept",
    )
    captions_format: str = option(
        "auto", "format of the caption files; auto: by content", CAPTION_FORMATS, group="captions"
    )
    split: str = option(
        "", "splits of a Karpathy file, such as train,restval; default: all", group="captions"
    )
    text_normalisation: str = option(
        "none",
        "text normalisation of the model that will read the captions (base-chinese: chinese)",
        ("none", "chinese"),
        group="captions",
    )

    soft_labels: int = option(
        0,
        "label entries kept per region; default: 10, or as in the source stores",
        least=0,
        group="store",
    )
    detector: str = option("", f"name to record in the store; default: {DETECTOR}", group="store")
    detector_revision: str = option("", "revision to record in the store", group="store")
    allow_other_detector: bool = option(False, "join stores of different detectors", group="store")
    strict_boxes: bool = option(
        False, "drop images with boxes outside them instead of clipping the boxes", group="store"
    )
    workers: int = option(
        0, "processes; default: one per core, divided among those of a launcher", group="work"
    )


def detector_of(sources: list[FeatureSource], options: Options) -> dict[str, Any]:
    """Return the detector that the sources record, or else the one of the flags.

    Raises UsageError if the sources' detectors differ, unless --allow-other-detector is given.
    """
    known = [source.facts().detector for source in sources if isinstance(source, StoreSource)]
    for other in known:
        if other != known[0] and not options.allow_other_detector:
            raise UsageError(
                f"stores of different detectors, {in_words(known[0])} and {in_words(other)}; if"
                " their features are of one size and you want them all, add --allow-other-detector"
            )

    if known and (options.detector or options.detector_revision):
        raise UsageError(
            "--detector and --detector-revision are for published features; a region store records"
            " its own; leave them out"
        )

    if not known:
        return {"name": options.detector or DETECTOR, "revision": options.detector_revision}

    others = [detector for i, detector in enumerate(known) if detector not in known[:i]][1:]

    return {**known[0], **({"joined_with": others} if others else {})}


def in_words(detector: dict[str, Any]) -> str:
    """Describe a detector as `name (revision ..)`."""
    others = [f"{name} {value}" for name, value in detector.items() if name != "name" and value]
    return str(detector.get("name")) + (f" ({', '.join(others)})" if others else "")


def vocabulary_of(sources: list[FeatureSource], options: Options) -> str:
    """Return the text of the vocabulary for the store: --vocab-file, or the first of a source."""
    if options.vocab_file:
        CaptionTokenizer(options.vocab_file)  # raises if it is not one, before anything is written
        return read_text(options.vocab_file, "--vocab-file")

    stores = [source.path for source in sources if isinstance(source, StoreSource)]
    files = [Path(path) / "vocab.txt" for path in stores]

    return next((read_text(file, "vocab.txt") for file in files if file.is_file()), "")


def read_only(path: str) -> list[str]:
    """Return the image ids of a file, one a line."""
    lines = (line.strip() for line in read_text(path, "--only").split("\n"))
    ids = [line for line in lines if line]
    if not ids:
        raise UsageError(f"--only {path}: is empty; give the ids of images, one a line")

    return ids


def plan_of(options: Options) -> BuildPlan:
    """Open the sources and plan what to build from them."""
    names: list[str] = []
    if options.class_names:
        names = ["background", *read_text(options.class_names, "--class-names").splitlines()]

    reading = ReadOptions(
        class_ids=options.class_ids,
        box_format=options.box_format,
        soft_labels=options.soft_labels or 10,
        num_classes=options.num_classes,
        num_attributes=options.num_attributes,
        trust_pickle=options.trust_pickle,
        image_sizes=options.image_sizes,
        class_names=tuple(names),
    )
    columns = tuple(filter(None, options.columns.split(",")))
    sources = [
        open_features(path, options.format, reading, columns, options.image_ids)
        for path in options.sources
    ]
    widths = [s.store.label_width() for s in sources if isinstance(s, StoreSource)]
    return BuildPlan(
        sources=sources,
        output=options.output,
        caption_files=list(options.captions),
        captions_format=options.captions_format,
        split=options.split,
        only=read_only(options.only) if options.only else None,
        detector=detector_of(sources, options),
        class_names=names,
        soft_labels=options.soft_labels or max(widths, default=10),
        vocabulary=vocabulary_of(sources, options),
        text_normalisation=options.text_normalisation,
        images_per_shard=options.images_per_shard,
        strict_boxes=options.strict_boxes,
        options={
            "sources": list(options.sources),
            "reading": {**vars(reading), "class_names": list(names)},
            "columns": list(columns),
            "format": options.format,
            "image_ids": options.image_ids and file_sha256(options.image_ids),
            "image_sizes": options.image_sizes and file_sha256(options.image_sizes),
        },
    )


def run(options: Options) -> None:
    """Build the store and report what it holds."""
    team = read_team(options.claim_timeout)
    plan = plan_of(options)
    workers = options.workers or team.share_of(os.cpu_count() or 1)
    for source in plan.sources if team.is_first else ():
        if isinstance(source, RecordSource):
            print("\n".join([source.how(), *source.remarks()]), flush=True)

    started = time.monotonic()
    manifest = build(plan, workers, options.max_dropped, options.restart, team)
    if team.is_first:
        report(options.output, manifest, time.monotonic() - started)


def report(output: str, manifest: dict[str, Any], seconds: float) -> None:
    """Print what the store holds, and which images were dropped."""
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
    for line in left_out(manifest):
        print(line)
    if manifest["dropped"] or manifest["captions_left_out"]:
        print(
            f"dropped images and unusable records are listed in {Path(output) / 'dropped.jsonl'},"
            " captions of no image with an example"
        )
    if manifest["inverted_boxes"] > 0.05 * counts["regions"]:
        print(
            f"warning: {manifest['inverted_boxes']} of {counts['regions']} boxes were inverted;"
            " if they are x, y, width, height, use --box-format xywh"
        )


def left_out(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield lines about captions that are in no image, and about images with other names."""
    for reason, count in manifest["captions_left_out"].items():
        yield f"left out: {count} captions, {reason}"
    if manifest["only_not_found"]:
        yield f"--only: {manifest['only_not_found']} ids mean no image"
    if manifest["renamed_images"]:
        yield (
            f"{manifest['renamed_images']} images share an id with an image of another source and"
            " were renamed SOURCE/ID"
        )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
