"""Make questions in the format of VCR about scenes of the sample corpus."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def question(
    random: np.random.Generator,
    name: str,
    kinds: Sequence[str],
    colours: Sequence[str],
    all_colours: Sequence[str],
) -> dict[str, Any]:
    """Draw one annotation of a scene of three or more distinct `kinds` in `colours`: what colour is
    an object, and which description of two others is true.

    Answers differ in the colour. The four rationales name the same two kinds, each in its own
    colour or in one other: each colour is in two of them, so no rationale is more like the others,
    and the question and its answer are about a third object.
    """
    asked, *others = random.permutation(len(kinds)).tolist()
    right = colours[asked]
    wrong = [
        str(c) for c in random.choice([c for c in all_colours if c != right], 3, replace=False)
    ]
    answers = [["the", [asked], "is", colour] for colour in [right, *wrong]]
    rationales = [
        _describe(pair) for pair in _pairs(random, others[:2], kinds, colours, all_colours)
    ]
    first = random.permutation(4).tolist()
    second = random.permutation(4).tolist()

    return {
        "objects": list(kinds),
        "img_fn": f"{name}.jpg",
        "annot_id": f"{name}-q0",
        "question": ["the", [asked], "is"],
        "answer_choices": [answers[i] for i in first],
        "answer_label": first.index(0),
        "rationale_choices": [rationales[i] for i in second],
        "rationale_label": second.index(0),
    }


def _describe(pair: Sequence[tuple[str, str]]) -> list[str]:
    (colour, kind), (other_colour, other_kind) = pair
    return ["there", "is", "a", colour, kind, "and", "a", other_colour, other_kind]


def _pairs(
    random: np.random.Generator,
    things: Sequence[int],
    kinds: Sequence[str],
    colours: Sequence[str],
    all_colours: Sequence[str],
) -> list[list[tuple[str, str]]]:
    """Return two things in their own colours, then with another colour for the second, for the
    first, and for both.
    """
    choices = []
    for thing in things:
        other = str(random.choice([c for c in all_colours if c != colours[thing]]))
        choices.append([(colours[thing], kinds[thing]), (other, kinds[thing])])

    return [[one, two] for one in choices[0] for two in choices[1]]
