"""Render the page of an evaluation: samples, their images, and the best and right answers."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render
from megatron_interbert.tasks.answering.prediction import Predictions
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.image_finder import store_of
from megatron_interbert.tasks.placing import Records

TEMPLATE = Path(__file__).with_name("page.html")


def result_page(
    result: dict[str, Any],
    records: Records,
    predictions: Predictions,
    answers: AnswerList,
    corpus: Corpus,
    most: int,
    photos: PhotoFolder | None,
    soft: bool,
) -> str:
    """Return the HTML of a page with up to `most` samples, spread evenly over the files; scores of
    `soft` answers are independent of each other.
    """
    symbols: dict[int, Markup] = {}
    shown = []

    for row in np.linspace(0, len(records) - 1, min(most, len(records))).astype(int):
        record = records.items[row]
        images = [int(image) for image in records.images[row]]
        for image in images:
            if image not in symbols:
                store, number = store_of(corpus, image)
                symbols[image] = draw_image(corpus.stores[store], number, photos, number=image)

        given = [answers[number] for number in predictions.numbers[row]]
        shares = predictions.probabilities[row].tolist()
        shown.append(
            {
                "id": record.id,
                "texts": record.texts,
                "images": images,
                "answers": options_of(record, given, shares),
                "right": right_of(record),
                "hit": record.answers.get(given[0], 0.0) > 0,
                "labelled": bool(record.answers),
            }
        )

    return render(
        TEMPLATE,
        result=result,
        peers=result.get("beside", []),
        samples=shown,
        symbols=symbols.values(),
        soft=soft,
    )


def options_of(record: Record, given: list[str], shares: list[float]) -> list[dict[str, Any]]:
    """Return the best answers to a sample with their probabilities, for the template."""
    return [
        {
            "text": answer,
            "probability": f"{share:.0%}",
            "width": f"{100 * share:.1f}",
            "right": record.answers.get(answer, 0.0) > 0,
        }
        for answer, share in zip(given, shares, strict=True)
    ]


def right_of(record: Record) -> str:
    """Return the right answers to a sample, best first, each with its score if that is below 1."""
    best = sorted(record.answers.items(), key=lambda pair: -pair[1])
    return ", ".join(answer if score == 1 else f"{answer} ({score:g})" for answer, score in best)
