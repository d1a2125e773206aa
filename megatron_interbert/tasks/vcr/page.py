"""Render the page of a VCR evaluation: questions with their images and option probabilities."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render
from megatron_interbert.tasks.vcr.job import softmax
from megatron_interbert.tasks.vcr.samples import Question, VcrImages

TEMPLATE = Path(__file__).with_name("page.html")


def result_page(
    result: dict[str, Any],
    questions: list[Question],
    answers: np.ndarray,
    rationales: np.ndarray,
    images: VcrImages,
    most: int,
    photos: PhotoFolder | None,
) -> str:
    """Return the HTML of a page with up to `most` questions, spread evenly over the file: image,
    options and their probabilities.

    `answers` and `rationales` are logits [questions, 4].
    """
    corpus = images.annotated or images.detected
    symbols: dict[int, Markup] = {}
    shown = []
    for number in np.linspace(0, len(questions) - 1, min(most, len(questions))).astype(int):
        q = questions[number]
        image = q.annotated if images.annotated is not None else q.detected
        symbols.setdefault(image, draw_image(corpus.stores[0], image, photos))
        shown.append(
            {
                "image": image,
                "text": q.question,
                "id": q.annot_id,
                "answers": options_of(q.answers, answers[number], q.answer_label),
                "rationales": options_of(q.rationales, rationales[number], q.rationale_label),
            }
        )

    metrics = result["metrics"]
    return render(
        TEMPLATE,
        result=result,
        questions=shown,
        figures=[f"{metrics[name]:.1f}" for name in ("q_a", "qa_r", "q_ar")],
        symbols=symbols.values(),
    )


def options_of(texts: list[str], logits: np.ndarray, right: int) -> dict[str, Any]:
    """Return the four options of a part with their probabilities, and whether the right one won."""
    options = [
        {"text": text, "probability": f"{probability:.0%}", "right": place == right}
        for place, (text, probability) in enumerate(zip(texts, softmax(logits), strict=True))
    ]
    return {"options": options, "hit": int(np.argmax(logits)) == right}
