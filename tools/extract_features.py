#!/usr/bin/env python3
"""Turns a folder of photos into a region store with an object detector.

The detector is a DETR-like model of transformers (a folder or a name on the hub: RT-DETR, Deformable DETR, DETR, ...) or
torchvision:fasterrcnn_resnet50_fpn and its relatives. Photos that cannot be used are listed with the reason in dropped.jsonl of
the store. A run that was killed goes on when the same command is given again.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# Processes share the work, not threads: that is faster here, and the results do not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_interbert.command_line import finite_number
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.parser import Parser
from megatron_interbert.preparation.building.build import BuildPlan, build
from megatron_interbert.preparation.building.detectors import BACKGROUND, DetectorChoice
from megatron_interbert.preparation.building.sources.photos import PhotoSource
from megatron_interbert.reading import read_text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "photos", metavar="PHOTOS", help="folder with jpg, png and webp files, at any depth; file names are image ids"
    )
    parser.add_argument("--detector", required=True, help="folder, name on the hub, or torchvision:NAME")
    parser.add_argument("--revision", default="", help="branch, tag or commit on the hub")
    parser.add_argument("--weights", default="", help="state dict for a torchvision detector (default: the published one)")
    parser.add_argument("--output", required=True, help="folder of the new store")
    parser.add_argument("--captions", nargs="+", default=[], help="caption files; photos without a caption are then left out")
    parser.add_argument("--vocab-file", help="WordPiece vocabulary, copied into the store as vocab.txt")
    parser.add_argument("--class-names", help="detector classes without background, one a line (default: those of the detector)")
    parser.add_argument("--max-regions", type=int, default=36, help="kept of a photo at most (default: %(default)s)")
    parser.add_argument("--min-regions", type=int, default=10, help="kept even below --min-score (default: %(default)s)")
    parser.add_argument(
        "--min-score", type=finite_number, default=0.2, help="of the best class that is not background (default: %(default)s)"
    )
    parser.add_argument("--soft-labels", type=int, default=10, help="label entries kept for a region (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="photos of one size that run together (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: 1 with a GPU, else one for each core)")
    parser.add_argument("--images-per-shard", type=int, default=1024, help="and of one piece of work (default: %(default)s)")
    parser.add_argument(
        "--max-dropped", type=finite_number, default=0.1, help="share of unusable photos that is allowed (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="throw away what a killed run with other settings has left")
    options = parser.parse_args()
    for name in ("max_regions", "batch_size", "soft_labels", "images_per_shard"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    if options.min_regions > options.max_regions:
        raise UsageError(f"--min-regions {options.min_regions}: more than --max-regions {options.max_regions}")
    return options


def read_class_names(path: str | None) -> list[str]:
    """Names with background first; none without a file."""
    return [BACKGROUND, *read_text(path, "--class-names").rstrip("\n").split("\n")] if path else []


def plan_of(options: argparse.Namespace) -> BuildPlan:
    """What is to be built: one source, the photos, seen by the detector."""
    choice = DetectorChoice(options.detector, options.revision, options.weights, options.device, options.soft_labels)
    limits = {name: getattr(options, name) for name in ("max_regions", "min_regions", "min_score")}
    source = PhotoSource(options.photos, choice, batch_size=options.batch_size, **limits)
    return BuildPlan(
        sources=[source],
        output=options.output,
        caption_files=options.captions,
        detector=source.facts().detector,
        class_names=read_class_names(options.class_names),
        soft_labels=options.soft_labels,
        vocabulary=read_text(options.vocab_file, "--vocab-file") if options.vocab_file else "",
        images_per_shard=options.images_per_shard,
        options=limits,
    )


def run() -> None:
    """Parse the command line and write the store."""
    options = parse()
    plan = plan_of(options)
    gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    started = time.monotonic()
    manifest = build(plan, options.workers or (1 if gpu else os.cpu_count() or 1), options.max_dropped, options.restart)
    counts, dropped = manifest["counts"], manifest["dropped"]
    why = f" ({', '.join(f'{reason}: {count}' for reason, count in dropped.items())}; see dropped.jsonl)" if dropped else ""
    print(
        f"{options.output}: {counts['images']} images, {counts['regions']} regions of {manifest['feature_dim']} features,"
        f" {counts['captions']} captions, {sum(dropped.values())} photos dropped{why};"
        f" {manifest['images_read'] / (time.monotonic() - started):.1f} photos/s"
    )


if __name__ == "__main__":
    run_entry(run)
