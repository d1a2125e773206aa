"""Build the self-contained page of an inspection: verdicts, histograms, examples with boxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

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
SHARDS = 20  # whose schema the page shows


def report_page(
    report: Report, store: RegionStore, photos: PhotoFolder | None, examples: int
) -> str:
    """Render the page as HTML, with up to `examples` images."""
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
    """Return the figures and facts at the top of the page, by name."""
    counts = report.counts
    facts = {name: counts[name] for name in ("images", "regions", "captions")}
    facts["looked at"] = f"{counts['inspected']['images']:,} images"
    facts |= {key.replace("_", " "): value for key, value in report.facts.items()}
    return {key: _plain(value) for key, value in facts.items()}


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(v) for v in value.values() if v) or "unknown"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def histogram(
    title: str, note: str, counts: Sequence[int], labels: Sequence[str]
) -> dict[str, Any]:
    """Lay out vertical bars, at most about eight of them labelled, evenly spread."""
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
    """Lay out the histograms that are not empty."""
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
    """Lay out horizontal bars for the most common classes."""
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
    """Choose up to `most` readable images, evenly spread; those without a photo only if needed."""
    pool = [image for image in report.readable if image in photographed]
    if len(pool) < most:
        pool += [image for image in report.readable if image not in photographed]
    if not pool:
        return []
    places = np.unique(np.linspace(0, len(pool) - 1, min(most, len(pool)), dtype=int))
    return sorted(pool[place] for place in places)


def examples_of(
    report: Report, store: RegionStore, photos: PhotoFolder | None, images: Sequence[int]
) -> tuple[list[Markup], list[dict[str, Any]]]:
    """Return the SVG symbols of some images, and what is shown below each: number, id, captions."""
    captions = CaptionsOfImages(store)
    symbols = []
    shown = []
    for image in images:
        try:
            symbol = draw_image(store, image, photos, class_names=report.class_names)
            texts = [text for text, _ in captions.read(image)]
        except (UsageError, UnicodeDecodeError):
            continue  # it is already among the problems
        symbols.append(symbol)
        shown.append({"number": image, "id": store.image_id(image), "captions": texts})
    return symbols, shown


def shard_row(shard: dict[str, Any]) -> dict[str, Any]:
    """Return the title of a shard, and its datasets or the error on opening it."""
    title = (
        f"{shard['file']}: {shard['images']:,} images, {shard['regions']:,} regions,"
        f" {shard['bytes'] / 2**20:.1f} MiB"
    )
    return {
        "title": title,
        "datasets": shard.get("datasets", {}),
        "error": shard.get("error", ""),
    }
