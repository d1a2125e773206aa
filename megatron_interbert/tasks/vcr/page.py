"""The page of a VCR evaluation: images with their questions and the probability of each option."""

import html
from typing import Any

import numpy as np

from megatron_interbert.pages.drawing import STYLE, draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.tasks.vcr.job import softmax
from megatron_interbert.tasks.vcr.samples import Question, VcrImages

PAGE_STYLE = STYLE + (
    "section{display:grid;grid-template-columns:minmax(220px,360px) 1fr;gap:1rem}@media(max-width:700px){section{display:block}}"
    "ol{padding-left:1.4rem;margin:.3rem 0}li{margin:.15rem 0;padding:.1rem .4rem;border-radius:4px}"
    "li.right{outline:2px solid #1a8f4c}li b{float:right;margin-left:1rem;font-weight:600}h2{font-size:17px;margin:.2rem 0}"
    "td,th{white-space:nowrap;padding:.3rem .5rem}.hit{color:#1a8f4c}.miss{color:#b3402e}\n"
)


def page(
    result: dict[str, Any],
    questions: list[Question],
    answers: np.ndarray,
    rationales: np.ndarray,
    images: VcrImages,
    most: int,
    photos: PhotoFolder | None,
) -> str:
    """Questions from all over the file: image, options with their probabilities, the right ones outlined."""
    corpus = images.annotated or images.detected
    sections, symbols = [], {}
    for number in np.linspace(0, len(questions) - 1, min(most, len(questions))).astype(int):
        q = questions[number]
        image = q.annotated if images.annotated is not None else q.detected
        symbols.setdefault(image, draw_image(corpus.stores[0], image, photos))
        sections.append(
            f'<section><svg role="img"><use href="#image-{image}"/></svg><div><h2>{html.escape(q.question)}</h2>'
            f"{_options('answer', q.answers, answers[number], q.answer_label)}"
            f"{_options('rationale, given the right answer', q.rationales, rationales[number], q.rationale_label)}"
            f'<p class="note">{html.escape(q.annot_id)}</p></div></section>'
        )
    metrics = result["metrics"]
    figures = "".join(f"<td>{metrics[name]:.1f} %</td>" for name in ("q_a", "qa_r", "q_ar"))
    origin = " Generated scenes and questions, not photographs." if result["data"]["generated"] else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>InterBERT VCR</title><style>{PAGE_STYLE}</style><svg class="symbols">{"".join(symbols.values())}</svg>'
        "<h1>Visual commonsense reasoning</h1><table><tr><th></th><th>Q to A</th><th>QA to R</th><th>Q to AR</th></tr>"
        f"<tr><td>accuracy</td>{figures}</tr><tr><td>chance</td><td>25.0 %</td><td>25.0 %</td><td>6.2 %</td></tr></table>"
        f'<p class="note">{result["questions"]} questions; the right option is outlined, probabilities to the right.{origin}</p>'
        f"{''.join(sections)}</html>"
    )


def _options(what: str, texts: list[str], logits: np.ndarray, right: int) -> str:
    probabilities = softmax(logits)
    verdict = "hit" if int(np.argmax(logits)) == right else "miss"
    lines = "".join(
        f"<li{' class=right' if i == right else ''}><b>{p:.0%}</b>{html.escape(text)}</li>"
        for i, (text, p) in enumerate(zip(texts, probabilities, strict=True))
    )
    return f'<p class="note {verdict}">{what}: {"right" if verdict == "hit" else "wrong"}</p><ol type="a">{lines}</ol>'
