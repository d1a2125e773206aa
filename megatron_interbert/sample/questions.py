"""Make questions in the format of VCR about scenes of the sample corpus."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def question(
    random: np.random.Generator,
    name: str,
    kinds: Sequence[str],
    colours: Sequence[str],
    all_kinds: Sequence[str],
    all_colours: Sequence[str],
) -> dict[str, Any]:
    """Draw one annotation of a scene with distinct `kinds` in `colours`: what colour is an object,
    and which description is true.

    Answers differ in the colour. The rationales describe two objects, others if there are enough;
    three of them get a colour or a kind wrong.
    """
    asked, *others = random.permutation(len(kinds)).tolist()
    right = colours[asked]
    wrong = [
        str(c) for c in random.choice([c for c in all_colours if c != right], 3, replace=False)
    ]
    answers = [["the", [asked], "is", colour] for colour in [right, *wrong]]
    pair = (others * 2)[:2] if len(others) > 1 else [others[0], asked]
    true = [(colours[i], kinds[i]) for i in pair]
    rationales = [
        _describe(true),
        *(_describe(false) for false in _false_pairs(random, true, kinds, all_kinds, all_colours)),
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


def _false_pairs(
    random: np.random.Generator,
    true: list[tuple[str, str]],
    kinds: Sequence[str],
    all_kinds: Sequence[str],
    all_colours: Sequence[str],
) -> list[list[tuple[str, str]]]:
    """Draw three pairs that differ from the true one: another colour of the first, another colour
    of the second, a kind that is not in the scene.
    """
    absent = [kind for kind in all_kinds if kind not in kinds]
    first, second = true

    def recoloured(thing: tuple[str, str]) -> tuple[str, str]:
        return str(random.choice([c for c in all_colours if c != thing[0]])), thing[1]

    return [
        [recoloured(first), second],
        [first, recoloured(second)],
        [(first[0], str(random.choice(absent))), second],
    ]
