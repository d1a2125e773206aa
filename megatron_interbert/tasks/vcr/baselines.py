"""Choose answers and rationales from their texts alone: what a model must beat before its figures
mean that it has seen the image.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_interbert.tasks.vcr.samples import OPTIONS, Question

SMOOTHING = 0.5  # added to each count of a word


def scores_by_overlap(questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many words each answer [n, 4] and each rationale [n, 4] shares with the other
    options.
    """
    parts = ([q.answers for q in questions], [q.rationales for q in questions])
    answers, rationales = (
        np.array([[shared_words(options, place) for place in range(OPTIONS)] for options in part])
        for part in parts
    )
    return answers, rationales


def shared_words(options: Sequence[str], place: int) -> float:
    """Count the words that an option shares with the others, mean over these."""
    own = Counter(options[place].split())
    others = [Counter(option.split()) for n, option in enumerate(options) if n != place]
    return float(np.mean([(own & other).total() for other in others]))


class TextOnly:
    """Choose options by naive Bayes over their words and pairs of words, with those of the question
    and, for rationales, of the right answer.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.counts = {part: (Counter(), Counter()) for part in ("answer", "rationale")}
        for q in questions:
            for part, options, right in parts_of(q):
                for place, option in enumerate(options):
                    self.counts[part][int(place == right)].update(words_of(option))

    def scores(self, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        """Return the log odds of the answers [n, 4] and of the rationales [n, 4]."""
        found: dict[str, list[list[float]]] = {"answer": [], "rationale": []}
        for q in questions:
            for part, options, _ in parts_of(q):
                found[part].append([self._odds(part, option) for option in options])

        return np.array(found["answer"]), np.array(found["rationale"])

    def _odds(self, part: str, option: str) -> float:
        wrong, right = self.counts[part]
        return sum(
            np.log((right[word] + SMOOTHING) / (wrong[word] / (OPTIONS - 1) + SMOOTHING))
            for word in words_of(option)
        )


def parts_of(q: Question) -> list[tuple[str, list[str], int]]:
    """Return the name of each part of a question, its options with what comes before them, and the
    place of the right one.
    """
    asked = f"{q.question} {q.answers[q.answer_label]}"
    return [
        ("answer", [f"{q.question} | {option}" for option in q.answers], q.answer_label),
        ("rationale", [f"{asked} | {option}" for option in q.rationales], q.rationale_label),
    ]


def words_of(text: str) -> set[str]:
    """Return the words and the pairs of words of a text."""
    words = text.split()
    return {*words, *(" ".join(pair) for pair in pairwise(words))}
