#!/usr/bin/env python3
"""Looks into a region store before it is trained on: what it holds, what is wrong with it, and what mends it.

Counts regions, boxes, captions and classes; finds broken records, repeats and empty captions; tells from the data whether class ids
are shifted or boxes in a wrong format; says whether its layout is fast. Writes inspection.html and inspection.json. Exit code 1
when there are problems, 2 for wrong use.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_output, check_writable, write_output
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parser import Parser
from megatron_interbert.preparation.inspection.page import report_page
from megatron_interbert.preparation.inspection.report import Options, inspect_store
from megatron_interbert.preparation.inspection.terminal import report_text
from megatron_interbert.reading import read_text


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of the region store")
    parser.add_argument("--output", help="folder for inspection.html and inspection.json (default: STORE-inspection)")
    parser.add_argument("--json", help="where the report as JSON goes (default: inspection.json in --output)")
    parser.add_argument("--photos", help="folder of photos IMAGE_ID.jpg, .jpeg or .png, shown behind the boxes")
    parser.add_argument("--examples", type=int, default=24, help="images shown on the page (default: %(default)s)")
    parser.add_argument("--max-images", type=int, help="look at so many images, spread evenly (default: all)")
    parser.add_argument(
        "--class-names", help="detector classes, one a line, with or without background; instead of the store's own"
    )
    parser.add_argument("--verify-hashes", action="store_true", help="compare every file with its sha256 in the manifest")
    return parser


def read_names(path: str, num_classes: int, background: int | None) -> list[str]:
    """Names by class id from a file that has a line for each class, or for each but background."""
    names = read_text(path, "--class-names").splitlines()
    if background is not None and len(names) == num_classes - 1:
        names.insert(background, "background")
    if len(names) != num_classes:
        raise UsageError(f"--class-names {path}: {len(names)} lines, but the store has {num_classes} classes (with background)")
    return names


def run() -> None:
    """Parse the command line, inspect, print and write."""
    parser = build_parser()
    options = parser.parse_args()
    if options.examples < 0 or (options.max_images is not None and options.max_images < 1):
        raise UsageError("--examples must be 0 or more and --max-images 1 or more")
    if options.photos and not Path(options.photos).is_dir():
        raise UsageError(f"--photos {options.photos}: no such folder")
    folder = Path(options.output or f"{options.store.rstrip('/')}-inspection")
    report_file = Path(options.json) if options.json else folder / "inspection.json"
    check_writable(folder, "--output")
    check_output(report_file, "--json")

    store = RegionStore(options.store)
    names = None
    if options.class_names:
        names = read_names(options.class_names, store.num_classes, store.manifest.get("background_class"))
    report = inspect_store(store, Options(options.max_images, options.verify_hashes, names))
    photos = photos_in(options.photos or "")
    write_output(folder / "inspection.html", report_page(report, store, photos, options.examples), "--output")
    write_output(report_file, report.as_json(), "--json")
    print(report_text(report))
    if photos and not any(photos.has(store.image_id(image)) for image in report.readable):
        print(f"--photos {options.photos}: no photo there has the name of an image, {store.image_id(0)}.jpg for one", file=sys.stderr)
    print(f"page: {folder / 'inspection.html'}, report: {report_file}")
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    run_entry(run, reports=True)
