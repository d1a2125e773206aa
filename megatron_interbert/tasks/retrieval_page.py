"""One HTML page of retrieval results: each query with its top images, drawn as boxes over the photo where there is one."""

import base64
import html
from pathlib import Path

import numpy as np

from megatron_interbert.data.store import RegionStore

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c2430;background:#fbfbfc}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;border-bottom:1px solid #dde1e7;text-align:right}
th:first-child,td:first-child{text-align:left}section{margin:1.6rem 0;border-top:1px solid #dde1e7;padding-top:1rem}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:.8rem}figure{margin:0;border:2px solid #dde1e7;
border-radius:6px;overflow:hidden;background:#fff}figure.right{border-color:#1a8f4c}figcaption{padding:.25rem .5rem;font-size:13px;
display:flex;justify-content:space-between;gap:.5rem}figcaption span{overflow-wrap:anywhere}
svg{display:block;width:100%;aspect-ratio:4/3;background:#eef1f5}.symbols{position:absolute;width:0;height:0}
.query{font-size:17px;margin:.2rem 0 .6rem}.note{color:#5c6675}.hit{color:#1a8f4c}.miss{color:#b3402e}
"""
COLOURS = ("#2b6cb0", "#b7791f", "#2f855a", "#9b2c2c", "#6b46c1", "#0987a0", "#b83280", "#4a5568")


def draw_image(store: RegionStore, image: int, photos: Path | None, max_boxes: int = 12) -> str:
    """An SVG symbol, to be used wherever the image is shown: photo if there is one, confident boxes with class names."""
    regions = store.read(image)
    names = store.manifest.get("class_names") or []
    width, height = regions.size
    parts = [f'<symbol id="image-{image}" viewBox="0 0 {width:g} {height:g}">']
    photo = photos / f"{store.image_id(image)}.jpg" if photos else None
    if photo is not None and photo.is_file():
        data = base64.b64encode(photo.read_bytes()).decode()
        parts.append(f'<image href="data:image/jpeg;base64,{data}" width="{width:g}" height="{height:g}"/>')
    seen: list[tuple[str, np.ndarray]] = []
    for box, ids, probs in zip(regions.boxes, regions.class_ids, regions.class_probs, strict=True):
        label = int(ids[probs.argmax()])
        name = names[label] if label < len(names) else str(label)
        if len(seen) == max_boxes or any(name == other and np.abs(box - place).max() < 0.12 * width for other, place in seen):
            continue  # the same object again
        seen.append((name, box))
        parts.append(draw_box(box, name, COLOURS[label % len(COLOURS)], width))
    return "".join([*parts, "</symbol>"])


def draw_box(box: np.ndarray, name: str, colour: str, width: float) -> str:
    """SVG of one box [4] with its name; line and letter sizes follow the image's width."""
    x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" fill="{colour}" fill-opacity=".12"'
        f' stroke="{colour}" stroke-width="{width / 220:.1f}"/>'
        f'<text x="{x + width / 90:.0f}" y="{y + width / 22:.0f}" font-size="{width / 24:.0f}" fill="{colour}"'
        f' stroke="#fff" stroke-width="{width / 160:.1f}" paint-order="stroke">{html.escape(name)}</text>'
    )


def metrics_table(result: dict) -> str:
    """The recall table of both directions."""
    columns = ["R@1", "R@5", "R@10", "median_rank", "mean_rank"]
    rows = ["<tr><th>direction</th>" + "".join(f"<th>{c.replace('_', ' ')}</th>" for c in columns) + "</tr>"]
    for direction in ("text_to_image", "image_to_text"):
        cells = "".join(f"<td>{result['metrics'][direction][c]:.1f}</td>" for c in columns)
        rows.append(f"<tr><td>{direction.replace('_', ' ')}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def result_page(
    result: dict,
    scores: np.ndarray,
    store: RegionStore,
    captions: np.ndarray,
    images: np.ndarray,
    photos: Path | None = None,
    queries: int = 40,
    top: int = 5,
) -> str:
    """The page as text. scores [captions, images]; captions and images are numbers in the store."""
    right = np.searchsorted(images, store.caption_image[captions])
    sections, shown = [], set()
    for query in np.linspace(0, len(captions) - 1, min(queries, len(captions))).astype(int):
        order = np.argsort(-scores[query], kind="stable")
        rank = 1 + int(np.flatnonzero(order == right[query])[0])
        figures = []
        for place, column in enumerate(order[:top], 1):
            image = int(images[column])
            shown.add(image)
            kind = " class=right" if column == right[query] else ""
            figures.append(
                f'<figure{kind}><svg role="img"><use href="#image-{image}"/></svg><figcaption>'
                f"<span>{place}. {html.escape(store.image_id(image))}</span><b>{scores[query, column]:+.2f}</b></figcaption></figure>"
            )
        verdict = f'<span class="{"hit" if rank == 1 else "miss"}">its image is number {rank} of {len(images)}</span>'
        sections.append(
            f'<section><p class="query">{html.escape(store.caption(int(captions[query])))}</p>'
            f'<p class="note">{verdict}</p><div class="row">{"".join(figures)}</div></section>'
        )
    origin = " Generated scenes, not photographs." if store.manifest.get("generated") else ""
    note = (
        f"{len(captions)} captions x {len(images)} images, {result['protocol']}; chance R@1 is {result['chance_R@1']:.2f} %."
        f" Score: margin of the matching head. The right image has a green frame.{origin}"
    )
    symbols = "".join(draw_image(store, image, photos) for image in sorted(shown))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>InterBERT retrieval</title><style>{STYLE}</style><svg class="symbols">{symbols}</svg>'
        f"<h1>Image retrieval by caption</h1>{metrics_table(result)}"
        f'<p class="note">{html.escape(note)}</p>{"".join(sections)}</html>'
    )
