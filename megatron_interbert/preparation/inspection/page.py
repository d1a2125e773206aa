"""The report of an inspection as one HTML page without outside resources: verdicts, histograms, examples with their boxes."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.pages.drawing import STYLE, draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.preparation.inspection.findings import Report
from megatron_interbert.preparation.inspection.report import CaptionsOfImages
from megatron_interbert.preparation.inspection.terminal import BOX_FIGURES, NUMBERS, box_figure, group

PAGE_STYLE = (
    STYLE
    + """
*{box-sizing:border-box}h1{margin:0 0 .2rem;font-size:26px;overflow-wrap:anywhere}h2{font-size:19px;margin:2.2rem 0 .7rem}
.verdict{border-left:5px solid #1a8f4c;background:#fff;border-radius:4px;padding:.5rem .8rem;margin:.5rem 0;
display:grid;grid-template-columns:5rem 1fr;box-shadow:0 0 0 1px #e6e9ee;overflow-wrap:anywhere}
.verdict.warning{border-color:#c98a12}.verdict.problem{border-color:#b3402e}.verdict b{margin-right:.5rem}
.level{font-weight:600;color:#1a7a42}.warning .level{color:#8f5f00}.problem .level{color:#b3402e}
.mend{margin:.25rem 0 0;color:#37414f}.mend::before{content:"→ "}.verdict details{margin:.1rem 0 0;font-size:13px}
.verdict ul{margin:.3rem 0;padding-left:1.2rem;font:13px/1.4 ui-monospace,monospace;color:#5c6675}
.facts{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:.4rem 0;color:#5c6675}.facts b{color:#1c2430}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:1rem;align-items:start}
.chart{background:#fff;border:1px solid #dde1e7;border-radius:6px;padding:.6rem .8rem}.chart h3{margin:0;font-size:15px}
.tall{grid-row:span 2}.chart p{margin:.1rem 0 .3rem;font-size:13px}.chart svg{aspect-ratio:auto;background:none}
.chart text,.bars text{font:12px system-ui,sans-serif;fill:#5c6675}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:1rem}
.examples figcaption{display:block;padding:.5rem .7rem .7rem;font-size:14px}.examples ul{margin:.3rem 0 0;padding-left:1.1rem}
.examples b{font-size:13px;overflow-wrap:anywhere}.scroll{overflow-x:auto}.scroll table{margin:.4rem 0}
.evidence{display:flex;flex-wrap:wrap;gap:0 4rem}.evidence>div{max-width:100%;flex:1 1 min(420px,100%)}
td.figure{white-space:nowrap}.best td{font-weight:600}
td.text,th.text{text-align:left}details{margin:.5rem 0}summary{cursor:pointer}code{font:13px ui-monospace,monospace}
@media(max-width:600px){body{margin:1rem auto}td,th{padding:.3rem .5rem}.scroll{font-size:13px}
.verdict{display:block}.level{margin-right:.5rem}}
"""
)
BAR = "#3b73b9"


def report_page(report: Report, store: RegionStore, photos: PhotoFolder | None, examples: int) -> str:
    """The page as text."""
    name = html.escape(Path(report.store).name)
    symbols, figures = _examples(report, store, photos, examples)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>Inspection of {name}</title>'
        f'<style>{PAGE_STYLE}</style><svg class="symbols">{symbols}</svg>'
        f"{_head(report, name)}{_verdicts(report)}"
        f'<h2>Counts</h2><div class="charts">{_classes(report)}{_histograms(report)}{_areas(report)}</div>'
        f"<h2>Evidence</h2><div class=evidence><div>{_shift(report)}</div><div>{_boxes(report)}</div></div>"
        f"<h2>Examples</h2>{figures}<h2>Schema</h2>{_schema(report)}</html>"
    )


def _head(report: Report, name: str) -> str:
    counts, seen = report.counts, report.counts["inspected"]
    facts = {name: counts[name] for name in ("images", "regions", "captions")} | {
        "looked at": f"{seen['images']:,} images",
        **{key.replace("_", " "): value for key, value in report.facts.items()},
    }
    shown = "".join(f"<span>{html.escape(key)} <b>{html.escape(_plain(value))}</b></span>" for key, value in facts.items())
    made_up = '<p class="note">Generated scenes, not photographs.</p>' if report.facts.get("generated") else ""
    return f'<h1>{name}</h1><p class="note">{report.summary}</p>{made_up}<div class="facts">{shown}</div>'


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(v) for v in value.values() if v) or "not said"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _verdicts(report: Report) -> str:
    parts = []
    for verdict in report.verdicts:
        more = [f"and {verdict.more} more"] if verdict.more > 0 else []
        places = "".join(f"<li>{html.escape(place)}</li>" for place in [*verdict.where, *more])
        where = (
            f"<details{' open' if verdict.level == 'problem' else ''}><summary class=note>where</summary><ul>{places}</ul></details>"
            if places
            else ""
        )
        mend = f'<p class="mend">{html.escape(verdict.mend)}</p>' if verdict.mend else ""
        parts.append(
            f'<div class="verdict {verdict.level}"><span class="level">{verdict.level}</span> <div><b>{html.escape(verdict.about)}</b>'
            f"{html.escape(verdict.what)}{mend}{where}</div></div>"
        )
    return "".join(parts)


def _chart(title: str, note: str, bars: Sequence[int], labels: Sequence[str]) -> str:
    """Upright bars with a label below each end and, where there is room, below the others."""
    width, height, highest = 380, 130, max(bars, default=0) or 1
    step = width / max(len(bars), 1)
    every = -(-len(bars) // 8)
    parts = []
    for place, (bar, label) in enumerate(zip(bars, labels, strict=True)):
        tall, x = bar / highest * (height - 16), place * step
        tall = max(tall, 1.5) if bar else 0
        parts.append(
            f'<rect x="{x + 0.06 * step:.1f}" y="{height - tall:.1f}" width="{0.88 * step:.1f}" height="{tall:.1f}" fill="{BAR}">'
            f"<title>{html.escape(label)}: {bar:,}</title></rect>"
        )
        if place % every == 0:
            parts.append(f'<text x="{x + step / 2:.1f}" y="{height + 15}" text-anchor="middle">{html.escape(label)}</text>')
    drawing = (
        f'<svg viewBox="-14 0 {width + 28} {height + 20}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="0" y="11">{highest:,}</text>'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="#c3cad4"/>{"".join(parts)}</svg>'
    )
    return f'<div class="chart"><h3>{html.escape(title)}</h3><p class="note">{html.escape(note)}</p>{drawing}</div>'


def _histograms(report: Report) -> str:
    charts = []
    for name, title in NUMBERS.items():
        h = report.histograms[name]
        if h["count"]:
            bars = group(h["bars"], 32)
            note = f"{h['least']} to {h['most']}, median {h['median']}"
            charts.append(_chart(title, note, [count for _, _, count in bars], [str(first) for first, _, _ in bars]))
    return "".join(charts)


def _areas(report: Report) -> str:
    areas = report.histograms["box_areas"]
    if not areas["count"]:
        return ""
    labels = [f"{100 * edge:g}%" for edge in areas["edges"]]
    return _chart("box sizes", "share of the image's area, up to", areas["bars"], labels)


def _classes(report: Report) -> str:
    classes, rows = report.classes, []
    highest = max((row["regions"] for row in classes["top"]), default=1)
    for place, row in enumerate(classes["top"]):
        y, name = place * 19, row["name"].split(",")[0] or f"class {row['id']}"
        rows.append(
            f'<text x="118" y="{y + 13}" text-anchor="end">{html.escape(name[:18])}</text><rect x="124" y="{y + 3}" height="13"'
            f' width="{max(200 * row["regions"] / highest, 1):.1f}" fill="{BAR}"/>'
            f'<text x="{130 + 200 * row["regions"] / highest:.1f}" y="{y + 13}">{row["regions"]:,}</text>'
        )
    note = f"{classes['never_seen']:,} of {classes['of']:,} classes never seen"
    drawing = f'<svg viewBox="0 0 380 {19 * len(rows) + 2}" role="img" aria-label="commonest classes">{"".join(rows)}</svg>'
    return f'<div class="chart tall"><h3>commonest classes</h3><p class="note">{note}</p>{drawing}</div>'


def _shift(report: Report) -> str:
    shift = report.class_shift
    rows = "".join(
        f"<tr{' class=best' if row['shift'] == shift['shift'] else ''}><td>{row['shift']:+d}</td><td>{row['matches']:,}</td>"
        f"<td>{row['expected']:,.1f}</td><td>{row['z']:.1f}</td></tr>"
        for row in shift["scores"]
    )
    table = (
        f"<table><tr><th>added to ids</th><th>names that fit</th><th>by chance</th><th>z</th></tr>{rows}</table>" if rows else ""
    )
    return f'<p>{html.escape(shift["said"])}</p><div class="scroll">{table}</div>'


def _boxes(report: Report) -> str:
    boxes = report.box_format
    rows = "".join(
        f"<tr><td>{title}</td><td class=figure>{box_figure(boxes[name])}</td></tr>" for name, title in BOX_FIGURES.items()
    )
    return f'<p>{html.escape(boxes["said"])}</p><div class="scroll"><table>{rows}</table></div>'


def _examples(report: Report, store: RegionStore, photos: PhotoFolder | None, most: int) -> tuple[str, str]:
    """Symbols and figures of up to `most` images that could be read; images with a photo come first."""
    shown = {image: photos is not None and photos.has(store.image_id(image)) for image in report.readable}
    images = sorted(report.readable, key=lambda image: not shown[image])
    with_photo = sum(shown.values())
    pool = images[:with_photo] if with_photo >= most else images
    picks = [pool[place] for place in np.unique(np.linspace(0, len(pool) - 1, min(most, len(pool)), dtype=int))] if pool else []
    captions, symbols, figures = CaptionsOfImages(store), [], []
    for image in sorted(picks):
        try:
            symbols.append(draw_image(store, image, photos, class_names=report.class_names))
            texts = captions.read(image)
        except (UsageError, UnicodeDecodeError):
            continue  # it is among the problems already
        listed = "".join(f"<li>{html.escape(text)}</li>" for text, _ in texts)
        figures.append(
            f'<figure><svg role="img"><use href="#image-{image}"/></svg><figcaption><b>{html.escape(store.image_id(image))}</b>'
            f"{f'<ul>{listed}</ul>' if listed else '<p class=note>no caption</p>'}</figcaption></figure>"
        )
    missing = "" if photos is None or with_photo else '<p class="note">No photo in the folder has the name of an image.</p>'
    return "".join(symbols), f'{missing}<div class="examples">{"".join(figures)}</div>'


def _schema(report: Report, most: int = 20) -> str:
    parts = []
    for place, shard in enumerate(report.shards[:most]):
        rows = "".join(
            f'<tr><td>{html.escape(name)}</td><td class="text">{" × ".join(map(str, d["shape"]))}</td><td class="text">{d["dtype"]}</td>'
            f'<td class="text">{html.escape(d["layout"])}</td></tr>'
            for name, d in shard.get("datasets", {}).items()
        )
        table = f'<table><tr><th>dataset</th><th class="text">shape</th><th class="text">type</th><th class="text">layout</th></tr>{rows}'
        inside = f'<div class="scroll">{table}</table></div>' if rows else html.escape(shard.get("error", ""))
        title = f"{shard['file']}: {shard['images']:,} images, {shard['regions']:,} regions, {shard['bytes'] / 2**20:.1f} MiB"
        parts.append(
            f"<details{' open' if place == 0 else ''}><summary><code>{html.escape(title)}</code></summary>{inside}</details>"
        )
    if len(report.shards) > most:
        parts.append(f'<p class="note">and {len(report.shards) - most} more shards, in inspection.json</p>')
    return "".join(parts)
