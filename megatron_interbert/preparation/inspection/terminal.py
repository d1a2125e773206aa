"""Format the report of an inspection for a terminal."""

from typing import Any

from megatron_interbert.preparation.inspection.findings import Report

BLOCKS = " ▁▂▃▄▅▆▇█"
NUMBERS = {
    "regions_per_image": "regions per image",
    "caption_words": "words per caption",
    "caption_characters": "characters per Chinese caption",
}


def group(bars: list[int], most: int) -> list[tuple[int, int, int]]:
    """Merge bars of single values into at most `most` bars (first value, last value, count),
    starting at the first that is not 0.
    """
    first = next((value for value, count in enumerate(bars) if count), 0)
    width = max(-(-(len(bars) - first) // most), 1)

    return [
        (start, start + width - 1, sum(bars[start : start + width]))
        for start in range(first, len(bars), width)
    ]


def sparkline(bars: list[int]) -> str:
    """Draw bars as one line of block characters; every bar above 0 is visible."""
    highest = max(bars, default=0) or 1
    return "".join(BLOCKS[-(-bar * (len(BLOCKS) - 1) // highest)] for bar in bars)


def report_text(report: Report) -> str:
    """Format the whole report; verdicts come last, next to the prompt."""
    parts = [
        _head(report),
        _schema(report),
        _histograms(report),
        _classes(report),
        _evidence(report),
        _verdicts(report),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(report: Report) -> list[str]:
    counts = report.counts
    seen = report.counts["inspected"]
    facts = "  ".join(f"{name} {_short(value)}" for name, value in report.facts.items())
    languages = ", ".join(
        f"{count} {name}"
        for name, count in sorted(counts["languages"].items(), key=lambda item: -item[1])
    )

    return [
        (
            f"{report.store}: {counts['images']} images, {counts['regions']} regions,"
            f" {counts['captions']} captions"
        ),
        (
            f"looked at {seen['images']} images, {seen['regions']} regions, {seen['captions']}"
            f" captions ({languages or 'none'})"
        ),
        facts,
    ]


def _short(value: Any) -> str:
    return " ".join(str(v) for v in value.values() if v) if isinstance(value, dict) else str(value)


def _schema(report: Report) -> list[str]:
    lines = []
    shards = [shard for shard in report.shards if "datasets" in shard]
    for shard in shards[:1]:
        lines.append(
            f"{shard['file']} ({shard['images']} images, {shard['bytes'] / 2**20:.1f} MiB)"
        )
        for name, dataset in shard["datasets"].items():
            lines.append(
                f"  {name:<17} {' x '.join(map(str, dataset['shape'])):<14} {dataset['dtype']:<8}"
                f" {dataset['layout']}"
            )

    layouts = {
        str([(n, d["dtype"], d["layout"]) for n, d in shard["datasets"].items()])
        for shard in shards
    }
    if len(shards) > 1:
        lines.append(
            f"  {len(shards) - 1} more shards,"
            f" {'all of this layout' if len(layouts) == 1 else f'{len(layouts)} different layouts'}"
        )

    return lines


def _histograms(report: Report) -> list[str]:
    lines = []
    for name, title in NUMBERS.items():
        h = report.histograms[name]
        if h["count"]:
            bars = sparkline([count for _, _, count in group(h["bars"], 40)])
            lines.append(
                f"{title:<31} {h['least']} to {h['most']}, median {h['median']}, quarter {h['p25']}"
                f" and {h['p75']}  |{bars}|"
            )

    areas = report.histograms["box_areas"]
    shares = [
        f"{edge:.2%} {bar / max(areas['count'], 1):.0%}"
        for edge, bar in zip(areas["edges"], areas["bars"], strict=True)
    ]
    lines.append(f"{'boxes up to .. of the image':<31} {', '.join(shares)}")

    return lines


def _classes(report: Report) -> list[str]:
    classes = report.classes
    top = ", ".join(
        f"{row['name'].split(',')[0] or row['id']} {row['regions']}" for row in classes["top"]
    )
    return [
        f"classes: {top or 'none'}",
        f"{classes['never_seen']} of {classes['of']} classes never seen",
    ]


def _evidence(report: Report) -> list[str]:
    lines = []
    if report.class_shift["scores"]:
        lines.append(
            f"class names at ids shifted by (evidence: {report.class_shift['evidence']},"
            f" {report.class_shift['images']} images)"
        )
        for row in report.class_shift["scores"]:
            lines.append(
                f"  {row['shift']:+d}  {row['matches']:>8} fit, {row['expected']:>8.1f} by chance,"
                f" z {row['z']:.1f}"
            )

    boxes = report.box_format
    for name, title in BOX_FIGURES.items():
        lines.append(f"  {title:<58} {box_figure(boxes[name])}")

    return lines


BOX_FIGURES = {
    "beyond_middle": "box centres right of, below the middle",
    "at_far_edge": "boxes at the right, bottom edge",
    "narrow": "boxes narrower than their distance from the near edge",
    "reaching_far": "images whose boxes reach the end of the long side",
    "crowded_short_side": "boxes at the far edge of the short side",
    "no_area": "boxes without area",
    "inverted": "boxes inverted when the store was built",
}


def box_figure(value: Any) -> str:
    """Format a share, or a pair of shares, as percentages."""
    if value is None:
        return "not recorded"
    return ", ".join(f"{v:.1%}" for v in (value if isinstance(value, list) else [value]))


def _verdicts(report: Report) -> list[str]:
    lines = []
    for verdict in report.verdicts:
        lines.append(f"{verdict.level:<8} {verdict.about}: {verdict.what}")
        lines += [f"           {place}" for place in verdict.where]
        if verdict.more > 0:
            lines.append(f"           and {verdict.more} more")
        if verdict.mend:
            lines.append(f"         > {verdict.mend}")

    return [*lines, report.summary]
