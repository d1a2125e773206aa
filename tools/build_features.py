#!/usr/bin/env python3
"""Builds a region store from published region features and caption files, or from other region stores.

    python tools/build_features.py train2014_obj36.tsv --captions captions_train2014.json --output coco --vocab-file vocab.txt
    python tools/build_features.py cc_store sbu_store --output both                       # join, cut anew, take a part (--only)

Features: base64 TSV (LXMERT, bottom-up attention), LMDB (ViLBERT, InterBERT), folders of npz, HDF5 (adaptive or fixed bottom-up
attention), region stores. Captions: COCO and Karpathy JSON, Flickr30K lines and token files, Conceptual Captions TSV, SBU JSON,
MUGE and KDD Cup queries, plain TSV and JSON lines. Stopped or killed? The same command goes on.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.command_line import finite_number
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import file_sha256
from megatron_interbert.parser import Parser
from megatron_interbert.preparation.building.build import BuildPlan, build
from megatron_interbert.preparation.building.captions import FORMATS as CAPTION_FORMATS
from megatron_interbert.preparation.building.sources.base import Source
from megatron_interbert.preparation.building.sources.fields import BACKGROUND_FIRST, BACKGROUND_NONE, ReadOptions
from megatron_interbert.preparation.building.sources.opening import FORMATS, open_source
from megatron_interbert.preparation.building.sources.stores import StoreSource
from megatron_interbert.reading import read_text

DETECTOR = "Faster R-CNN ResNet-101, Visual Genome"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files or folders of features, in the order of the store")
    parser.add_argument("--output", required=True, help="folder of the new store")
    parser.add_argument("--format", default="auto", choices=FORMATS, help="what SOURCE is (default: by its content)")
    parser.add_argument(
        "--columns",
        default="",
        help="names of a TSV's columns where their number does not tell: image_id,image_w,image_h,num_boxes,boxes,features"
        " and of labels objects_id,objects_conf or cls_prob; other names are passed over",
    )
    parser.add_argument(
        "--image-ids", default="", help="file that names the images of an HDF5 (imgid2idx as JSON or pickle, or one a line)"
    )
    parser.add_argument("--captions", nargs="+", default=[], help="caption files; without them captions of the source are kept")
    parser.add_argument("--captions-format", default="auto", choices=CAPTION_FORMATS, help="default: by content")
    parser.add_argument("--split", default="", help="of a Karpathy file, comma-separated: train,restval (default: all)")
    parser.add_argument("--only", help="file with the image ids to keep, one a line")
    parser.add_argument("--class-ids", choices=(BACKGROUND_FIRST, BACKGROUND_NONE),
                        help="whether class id 0 is background or the first object (default: the habit of the format)")  # fmt: skip
    parser.add_argument("--box-format", default="xyxy", choices=("xyxy", "xywh", "yxyx"), help="pixels (default: %(default)s)")
    parser.add_argument("--num-classes", type=int, default=1601, help="with background (default: %(default)s)")
    parser.add_argument(
        "--soft-labels", type=int, default=0, help="label entries kept for a region (default: 10, or those of the store)"
    )
    parser.add_argument("--class-names", help="detector classes without background, one a line")
    parser.add_argument("--detector", help=f"recorded in the store (default: {DETECTOR})")
    parser.add_argument("--detector-revision", default="", help="recorded in the store")
    parser.add_argument("--allow-other-detector", action="store_true", help="join stores of different detectors")
    parser.add_argument("--vocab-file", help="WordPiece vocabulary; copied into the store, and all captions tokenised with it")
    parser.add_argument("--text-normalisation", default="none", choices=("none", "chinese"),
                        help="that of the model (base-chinese: chinese), for which the captions are tokenised")  # fmt: skip
    parser.add_argument("--trust-pickle", action="store_true", help="read pickles inside the input; only numbers, strings, arrays")
    parser.add_argument("--images-per-shard", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument(
        "--max-dropped", type=finite_number, default=0.1, help="share of unusable images that is allowed (default: %(default)s)"
    )
    parser.add_argument("--strict-boxes", action="store_true", help="drop images with boxes outside instead of clipping these")
    parser.add_argument("--restart", action="store_true", help="throw away what an unfinished build has left and begin anew")
    return parser.parse_args()


def detector_of(sources: list[Source], arguments: argparse.Namespace) -> dict[str, object]:
    """What the sources say of their detector, else the flags."""
    known = [source.facts().detector for source in sources if isinstance(source, StoreSource)]
    for other in known:
        if other != known[0] and not arguments.allow_other_detector:
            raise UsageError(f"stores of different detectors, {known[0]} and {other}; join them with --allow-other-detector")
    if known and (arguments.detector or arguments.detector_revision):
        raise UsageError("--detector and --detector-revision are for published features; a region store knows its own")
    if known:
        others = [detector for i, detector in enumerate(known) if detector not in known[:i]][1:]
        return {**known[0], **({"joined_with": others} if others else {})}
    return {"name": arguments.detector or DETECTOR, "revision": arguments.detector_revision}


def vocabulary_of(sources: list[Source], arguments: argparse.Namespace) -> str:
    """The text of the vocabulary to go into the store: the file given, else that of the first store among the sources."""
    if arguments.vocab_file:
        CaptionTokenizer(arguments.vocab_file)  # before anything is written: is it one?
        return read_text(arguments.vocab_file, "--vocab-file")
    files = [Path(source.path) / "vocab.txt" for source in sources if isinstance(source, StoreSource)]
    return next((read_text(file, "vocab.txt") for file in files if file.is_file()), "")


def run() -> None:
    """Parse the command line and write the store."""
    arguments = parse()
    for name in ("images_per_shard", "workers", "num_classes"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected 1 or more")
    if arguments.soft_labels < 0 or not 0 <= arguments.max_dropped <= 1:
        raise UsageError("--soft-labels must not be negative, and --max-dropped lies between 0 and 1")
    options = ReadOptions(
        class_ids=arguments.class_ids or "",
        box_format=arguments.box_format,
        soft_labels=arguments.soft_labels or 10,
        num_classes=arguments.num_classes,
        trust_pickle=arguments.trust_pickle,
    )
    columns = tuple(filter(None, arguments.columns.split(",")))
    sources = [open_source(path, arguments.format, options, columns, arguments.image_ids) for path in arguments.sources]
    widths = [source.store.label_width() for source in sources if isinstance(source, StoreSource)]
    names = ["background", *read_text(arguments.class_names, "--class-names").splitlines()] if arguments.class_names else []
    plan = BuildPlan(
        sources=sources,
        output=arguments.output,
        caption_files=arguments.captions,
        captions_format=arguments.captions_format,
        split=arguments.split,
        only=read_text(arguments.only, "--only").split("\n") if arguments.only else None,
        detector=detector_of(sources, arguments),
        class_names=names,
        soft_labels=arguments.soft_labels or max(widths, default=10),
        vocabulary=vocabulary_of(sources, arguments),
        text_normalisation=arguments.text_normalisation,
        images_per_shard=arguments.images_per_shard,
        strict_boxes=arguments.strict_boxes,
        options={
            "sources": arguments.sources,
            "reading": vars(options),
            "columns": list(columns),
            "format": arguments.format,
            "image_ids": arguments.image_ids and file_sha256(arguments.image_ids),
        },
    )
    started = time.monotonic()
    manifest = build(plan, arguments.workers, arguments.max_dropped, arguments.restart)
    report(arguments.output, manifest, time.monotonic() - started)


def report(output: str, manifest: dict, seconds: float) -> None:
    """What is in the store and what is not."""
    counts = manifest["counts"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in manifest["images_by_label_kind"].items())
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    print(f"{output}: {counts['images']} images (labels: {kinds}), {counts['regions']} regions, {counts['captions']} captions")
    print(f"{len(manifest['shards'])} shards, {size:.0f} MB, {seconds:.1f} s, {manifest['repaired_boxes']} boxes clipped")
    for reason, count in manifest["dropped"].items():
        print(f"dropped: {count} images, {reason}")
    if manifest["dropped"]:
        print(f"each is listed in {Path(output) / 'dropped.jsonl'}")
    if manifest["inverted_boxes"] > 0.05 * counts["regions"]:
        print(f"warning: {manifest['inverted_boxes']} of {counts['regions']} boxes were inverted; they look like x, y, width, height:"
              " --box-format xywh")  # fmt: skip


if __name__ == "__main__":
    run_entry(run)
