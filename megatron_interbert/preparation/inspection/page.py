"""The page of an inspection: verdicts, histograms, examples with their boxes; stands alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render
from megatron_interbert.preparation.inspection.findings import Report
from megatron_interbert.preparation.inspection.report import CaptionsOfImages
from megatron_interbert.preparation.inspection.terminal import (
    BOX_FIGURES,
    NUMBERS,
    box_figure,
    group,
)

TEMPLATE = Path(__file__).with_name("page.html")
CHART = (380, 130)  # width and height of the bars
SHARDS = 20  # of which the page shows the schema


def report_page(
    report: Report, store: RegionStore, photos: PhotoFolder | None, examples: int
) -> str:
    """Print the page as text."""
    photographed = {
        image for image in report.readable if photos and photos.has(store.image_id(image))
    }
    symbols, shown = examples_of(report, store, photos, choose(report, photographed, examples))
    return render(
        TEMPLATE,
        name=Path(report.store).name,
        report=report,
        facts=facts_of(report),
        classes=class_bars(report.classes["top"]),
        never_seen=f"{report.classes['never_seen']:,}",
        of_classes=f"{report.classes['of']:,}",
        histograms=histograms_of(report),
        boxes={title: box_figure(report.box_format[name]) for name, title in BOX_FIGURES.items()},
        examples=shown,
        symbols=symbols,
        no_photo_fits=photos is not None and not photographed,
        shards=[shard_row(shard) for shard in report.shards[:SHARDS]],
        more_shards=len(report.shards) - SHARDS,
    )


def facts_of(report: Report) -> dict[str, str]:
    """Give the figures and facts of the head of the page."""
    counts = report.counts
    facts = {name: counts[name] for name in ("images", "regions", "captions")}
    facts["looked at"] = f"{counts['inspected']['images']:,} images"
    facts |= {key.replace("_", " "): value for key, value in report.facts.items()}
    return {key: _plain(value) for key, value in facts.items()}


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(v) for v in value.values() if v) or "not said"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def histogram(
    title: str, note: str, counts: Sequence[int], labels: Sequence[str]
) -> dict[str, Any]:
    """Lay out upright bars, with a label below each end and, where there is room, the others."""
    width, height = CHART
    highest = max(counts, default=0) or 1
    step = width / max(len(counts), 1)
    every = max(-(-len(counts) // 8), 1)
    bars = []
    for place, (count, label) in enumerate(zip(counts, labels, strict=True)):
        tall = max(count / highest * (height - 16), 1.5) if count else 0
        x = place * step
        bars.append(
            {
                "x": f"{x + 0.06 * step:.1f}",
                "y": f"{height - tall:.1f}",
                "width": f"{0.88 * step:.1f}",
                "tall": f"{tall:.1f}",
                "middle": f"{x + step / 2:.1f}",
                "label": label,
                "labelled": place % every == 0,
                "count": f"{count:,}",
            }
        )
    return {
        "title": title,
        "note": note,
        "bars": bars,
        "highest": f"{highest:,}",
        "width": width,
        "height": height,
    }


def histograms_of(report: Report) -> list[dict[str, Any]]:
    """Lay out the histograms that have something to show."""
    charts = []
    for name, title in NUMBERS.items():
        found = report.histograms[name]
        if found["count"]:
            bars = group(found["bars"], 32)
            note = f"{found['least']} to {found['most']}, median {found['median']}"
            counts = [count for _, _, count in bars]
            charts.append(histogram(title, note, counts, [str(first) for first, _, _ in bars]))

    areas = report.histograms["box_areas"]
    if areas["count"]:
        labels = [f"{100 * edge:g}%" for edge in areas["edges"]]
        note = "share of the image's area, up to"
        charts.append(histogram("box sizes", note, areas["bars"], labels))
    return charts


def class_bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lay out the bars of the commonest classes, one below the other."""
    highest = max((row["regions"] for row in rows), default=1)
    bars = []
    for place, row in enumerate(rows):
        y = place * 19
        length = 200 * row["regions"] / highest
        name = row["name"].split(",")[0] or f"class {row['id']}"
        bars.append(
            {
                "name": name[:18],
                "y": y + 3,
                "text_y": y + 13,
                "width": f"{max(length, 1):.1f}",
                "end": f"{130 + length:.1f}",
                "regions": f"{row['regions']:,}",
            }
        )
    return bars


def choose(report: Report, photographed: set[int], most: int) -> list[int]:
    """Choose images that could be read, evenly spread; those with a photo come first."""
    pool = [image for image in report.readable if image in photographed]
    if len(pool) < most:
        pool += [image for image in report.readable if image not in photographed]
    if not pool:
        return []
    places = np.unique(np.linspace(0, len(pool) - 1, min(most, len(pool)), dtype=int))
    return sorted(pool[place] for place in places)


def examples_of(
    report: Report, store: RegionStore, photos: PhotoFolder | None, images: Sequence[int]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Give the symbols of some images, and what is shown below each."""
    captions = CaptionsOfImages(store)
    symbols = []
    shown = []
    for image in images:
        try:
            symbol = draw_image(store, image, photos, class_names=report.class_names)
            texts = [text for text, _ in captions.read(image)]
        except (UsageError, UnicodeDecodeError):
            continue  # it is among the problems already
        symbols.append(symbol)
        shown.append({"number": image, "id": store.image_id(image), "captions": texts})
    return symbols, shown


def shard_row(shard: dict[str, Any]) -> dict[str, Any]:
    """Give the title of a shard, and its datasets or why it has none."""
    title = (
        f"{shard['file']}: {shard['images']:,} images, {shard['regions']:,} regions,"
        f" {shard['bytes'] / 2**20:.1f} MiB"
    )
    return {
        "title": title,
        "datasets": shard.get("datasets", {}),
        "error": shard.get("error", ""),
    }
