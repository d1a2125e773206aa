"""Turn photos into a region store with an object detector, a vision backbone, or both.

    interbert extract-features photos --detector PekingU/rtdetr_r50vd --output store
    interbert extract-features photos --backbone facebook/dinov2-base --grid 14x14 --output store

The detector is a DETR-like model of transformers (a folder or a name on the hub: RT-DETR,
Deformable DETR, DETR, ...) or torchvision:fasterrcnn_resnet50_fpn and its relatives. Without one,
the cells of a vision backbone are the regions, as in M6, and have no class labels. Photos that
cannot be used are listed with the reason in dropped.jsonl of the store. A run that was stopped or
killed is resumable: run the same command again.
"""

import argparse
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

# Processes share the work, not threads: faster here, and results do not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from megatron_interbert.command_line import run_command
from megatron_interbert.commands.build_features import BuildingOptions, left_out
from megatron_interbert.config.options import argument, option, redefault
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.detectors import BACKGROUND, DetectorChoice
from megatron_interbert.preparation.building.extents import RESIZES
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.photo_files import PhotoFiles, open_photos
from megatron_interbert.preparation.building.sources.photos import PhotoSource, start_worker
from megatron_interbert.preparation.sharing import read_team
from megatron_interbert.reading import read_text

MOST_DECODERS = 8
ALL_CELLS = 1 << 31  # more than a grid has
# flags that mean nothing without a detector, or without a backbone
OF_DETECTOR = (
    *("revision", "weights", "max_regions", "min_regions", "min_score", "soft_labels"),
    "class_names",
)
OF_BACKBONE = ("backbone_revision", "grid", "pool", "resize")


def grid(text: str) -> tuple[int, int]:
    """Read (14, 16) from `14x16`."""
    rows, cross, columns = text.partition("x")
    if not cross or not rows.isdigit() or not columns.isdigit() or not int(rows) * int(columns):
        raise argparse.ArgumentTypeError(f"'{text}', expected rows x columns, such as 14x14")

    return int(rows), int(columns)


@dataclass
class Options(BuildingOptions):
    """Hold the flags of extract-features."""

    GROUP: ClassVar[str] = "detector"

    photos: list[str] = argument(
        "folders with photos at any depth, or with Parquet, Arrow (datasets) or tar files of"
        " photos; such files; tables with tabs and photos in base64",
        several=True,
        group="data",
    )
    captions: list[str] = redefault(
        BuildingOptions,
        "captions",
        (),
        "caption files; photos without a caption are then left out; default: captions that come"
        " with the photos",
    )
    detector: str = option(
        "", "whose boxes are the regions: folder, name on the hub, or torchvision:NAME"
    )
    backbone: str = option(
        "",
        "vision model of transformers (DINOv2, SigLIP, ViT, ResNet, ..) whose cells are the regions"
        " or, with --detector, whose features are averaged over its boxes",
    )
    grid: tuple[int, int] = option(
        (), "rows and columns of cells, such as 14x14; default: as the model was trained", read=grid
    )
    pool: int = option(1, "cells a side that are averaged into one", least=1)
    resize: str = option(
        "whole",
        "how a photo becomes the backbone's input: stretched, with its shape kept and a border, or"
        " its middle alone",
        RESIZES,
    )
    revision: str = option("", "branch, tag or commit of the --detector on the hub")
    backbone_revision: str = option("", "branch, tag or commit of the --backbone on the hub")
    weights: str = option("", "state dict for a torchvision detector; default: the published one")
    max_regions: int = option(36, "regions kept per photo at most", least=1)
    min_regions: int = option(10, "regions kept per photo even below --min-score")
    min_score: float = option(0.2, "least score of a region's best class other than background")
    soft_labels: int = option(10, "label entries kept per region", least=1)

    batch_size: int = option(8, "photos of one size per forward pass", least=1, group="work")
    device: str = option("auto", "where the models run", ("auto", "cpu", "cuda"), group="work")
    workers: int = option(
        0,
        "processes; default: one per GPU, or else per core, divided among those of a launcher",
        group="work",
    )

    decoders: int = option(
        -1,
        "processes that decode photos beside each worker; default: with a GPU, the cores that are"
        f" left, {MOST_DECODERS} at most; else none",
        least=-1,
        group="work",
    )

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if not self.detector and not self.backbone:
            raise UsageError("--detector and --backbone are both missing; give one, or both")
        for model, names in (("detector", OF_DETECTOR), ("backbone", OF_BACKBONE)):
            given = [name for name in names if not self.is_default(name)]
            if given and not getattr(self, model):
                raise UsageError(
                    f"{self.told(given[0])}: a setting of a --{model}; give one, or leave it out"
                )

        if self.detector and self.resize == "crop":
            raise UsageError(
                "--resize crop leaves out a part of each photo, where a --detector finds boxes;"
                " give whole or pad"
            )

        if self.min_regions > self.max_regions:
            raise UsageError(
                f"--min-regions {self.min_regions} is more than --max-regions {self.max_regions}"
            )


def read_class_names(path: str) -> list[str]:
    """Return the class names of a file with background put first; empty without a file."""
    if not path:
        return []
    return [BACKGROUND, *read_text(path, "--class-names").rstrip("\n").split("\n")]


def find_photos(paths: Sequence[str], shown: bool = True) -> list[PhotoFiles]:
    """Open the photos at some paths; if `shown`, say which files beside them are none."""
    found = [files for path in paths for files in open_photos(path)]
    for files in found if shown else ():
        others = getattr(files, "others", None)
        if others:
            kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
            print(
                f"{files.path}: files that are no photos: {kinds} (give captions with --captions)"
            )

    return found


def plan_of(options: Options, shown: bool = True) -> BuildPlan:
    """Plan the build: the photos as the detector sees them; if `shown`, say what is left out."""
    choice = DetectorChoice(
        options.detector,
        options.revision,
        options.weights,
        options.device,
        options.soft_labels,
        options.backbone,
        options.backbone_revision,
        tuple(options.grid),
        options.pool,
        options.resize,
    )
    names = ("max_regions", "min_regions", "min_score")
    limits = {name: getattr(options, name) for name in names}
    if not options.detector:
        limits = {"max_regions": ALL_CELLS, "min_regions": ALL_CELLS, "min_score": 0.0}

    sources = [
        PhotoSource(files, choice, batch_size=options.batch_size, **limits)
        for files in find_photos(options.photos, shown)
    ]
    vocabulary = read_text(options.vocab_file, "--vocab-file") if options.vocab_file else ""

    return BuildPlan(
        sources=sources,
        output=options.output,
        caption_files=list(options.captions),
        detector=sources[0].facts().detector,
        class_names=read_class_names(options.class_names),
        soft_labels=options.soft_labels,
        vocabulary=vocabulary,
        images_per_shard=options.images_per_shard,
        options=limits,
    )


def run(options: Options) -> None:
    """Build the store and report what it holds."""
    team = read_team(options.claim_timeout)
    plan = plan_of(options, team.is_first)
    gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
    workers = options.workers or team.share_of(gpus or os.cpu_count() or 1)
    decoders = options.decoders
    if decoders < 0:
        cores = (os.cpu_count() or 1) // (team.local_size * workers)
        decoders = min(max(cores - 1, 0), MOST_DECODERS) if gpus else 0
    for source in plan.sources:
        source.decoders = decoders

    plan.start_worker = functools.partial(start_worker, team.local_rank * workers, decoders)
    started = time.monotonic()
    manifest = build(plan, workers, options.max_dropped, options.restart, team)
    if team.is_first:
        report(options.output, manifest, time.monotonic() - started)


def report(output: str, manifest: dict[str, Any], seconds: float) -> None:
    """Print what the store holds, and how many photos were dropped."""
    rate = manifest["images_read"] / seconds
    counts = manifest["counts"]
    dropped = manifest["dropped"]
    why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
    for line in left_out(manifest):
        print(line)

    print(
        f"{output}: {counts['images']} images, {counts['regions']} regions of"
        f" {manifest['feature_dim']} features, {counts['captions']} captions,"
        f" {sum(dropped.values())} photos dropped"
        + (f" ({why}; see dropped.jsonl)" if why else "")
        + f"; {rate:.1f} photos/s"
    )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
