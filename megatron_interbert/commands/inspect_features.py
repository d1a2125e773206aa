"""Inspect a region store before training on it: what it holds, what is wrong, how to fix it.

    interbert inspect-features coco --image-folder train2014

Counts regions, boxes, captions and classes; finds broken records, repeats and empty captions;
detects from the data whether class ids are shifted, captions are of other images or boxes have a
wrong format; reports whether its layout is fast. Writes inspection.html and inspection.json. Exit
code 1 if there are problems, 2 for wrong use.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_output, check_writable, write_output
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.preparation.inspection.page import report_page
from megatron_interbert.preparation.inspection.report import InspectionOptions, inspect_store
from megatron_interbert.preparation.inspection.terminal import report_text
from megatron_interbert.reading import read_text


@dataclass
class Options(Flags):
    """Hold the flags of inspect-features."""

    GROUP: ClassVar[str] = "data"

    store: str = argument("folder of the region store")
    max_images: int = option(0, "images to inspect, spread evenly; default: all", least=0)
    class_names: str = option(
        "",
        "detector classes, one a line, with or without background; default: the store's own",
    )
    verify_hashes: bool = option(False, "compare every file with its sha256 in the manifest")

    output: str = option(
        "",
        "folder for inspection.html and inspection.json; default: STORE-inspection",
        group="page",
    )
    json: str = option(
        "", "file for the report as JSON; default: inspection.json in --output", group="page"
    )
    image_folder: str = option(
        "",
        "folder of photos IMAGE_ID.jpg, .jpeg or .png to show behind the boxes",
        old_names=("--photos",),
        group="page",
    )
    examples: int = option(24, "images shown on the page", least=0, group="page")

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if "max_images" in self.given and not self.max_images:
            raise UsageError("--max-images is 0, expected 1 or more")
        if self.image_folder and not Path(self.image_folder).is_dir():
            raise UsageError(f"--image-folder {self.image_folder}: no such folder")


def read_names(path: str, num_classes: int, background: int | None) -> list[str]:
    """Read class names in order of class id from a file with a line per class.

    The file may leave out `background`. Raises UsageError for any other number of lines.
    """
    names = read_text(path, "--class-names").splitlines()
    if background is not None and len(names) == num_classes - 1:
        names.insert(background, "background")
    if len(names) != num_classes:
        raise UsageError(
            f"--class-names {path}: {len(names)} lines, but the store has {num_classes} classes"
            " (background included)"
        )

    return names


def run(options: Options) -> None:
    """Inspect the store, write the reports and print a summary; exit with 1 if it has problems."""
    folder = Path(options.output or f"{options.store.rstrip('/')}-inspection")
    report_file = Path(options.json) if options.json else folder / "inspection.json"
    check_writable(folder, "--output")
    check_output(report_file, "--json")

    store = RegionStore(options.store)
    names = None
    if options.class_names:
        background = store.manifest.get("background_class")
        names = read_names(options.class_names, store.num_classes, background)

    chosen = InspectionOptions(options.max_images or None, options.verify_hashes, names)
    report = inspect_store(store, chosen)

    photos = photos_in(options.image_folder)
    page = report_page(report, store, photos, options.examples)
    write_output(folder / "inspection.html", page, "--output")
    write_output(report_file, report.as_json(), "--json")
    print(report_text(report))

    if photos and not any(photos.has(store.image_id(image)) for image in report.readable):
        print(
            f"--image-folder {options.image_folder}: no photo there is named after an image, such"
            f" as {store.image_id(0)}.jpg",
            file=sys.stderr,
        )

    print(f"page: {folder / 'inspection.html'}, report: {report_file}")
    sys.exit(1 if report.problems else 0)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run, reports=True)
