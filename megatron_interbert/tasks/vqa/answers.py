"""Compare answers as the official evaluation of VQA does (GT-Vision-Lab/VQA, vqaEval.py), its
oddities included.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from megatron_interbert.tasks.vqa.contractions import contractions

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the official code passes a flag of the regular expression as this limit
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
CONTRACTIONS = contractions()
FULL_SCORE = 3  # people whose agreement makes an answer right


@lru_cache(maxsize=1 << 16)  # ten people answer each question, mostly alike
def normalise_answer(text: str) -> str:
    """Return an answer as the official evaluation compares it: without punctuation and articles, in
    lower case, number words as digits, contractions with apostrophes.
    """
    words = (DIGITS.get(word, word) for word in without_punctuation(stripped(text)).lower().split())
    kept = (word for word in words if word not in ARTICLES)

    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def stripped(text: str) -> str:
    """Return an answer on one line, without space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """Delete or replace punctuation.

    Each mark is deleted if it touches a space anywhere in the text, and all are if the text has a
    number such as 1,000; otherwise a mark becomes a space.
    """
    result = text
    has_number = COMMA_IN_NUMBER.search(text) is not None

    for mark in PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_space or has_number else " ")

    return PERIOD.sub("", result, count=MOST_PERIODS)


def official_accuracy(given: str, answers: Sequence[str]) -> float:
    """Return the accuracy (0 to 1) of an answer against those that people gave.

    It is the mean, over the people, of min(1, others who gave it / 3). If all people agree to the
    letter, texts are compared as they are, else as `normalise_answer` gives them.
    """
    said = [stripped(answer) for answer in answers]
    ours = stripped(given)
    if len(set(said)) > 1:
        said = [normalise_answer(answer) for answer in said]
        ours = normalise_answer(ours)

    return score_of(said.count(ours), len(said))


def soft_scores(answers: Iterable[str]) -> dict[str, float]:
    """Return the score (0 to 1) to train each answer of ten people to: what the official accuracy
    gives for it, 0.3, 0.6, 0.9 and 1 for one, two, three and more people.
    """
    counts = Counter(normalise_answer(answer) for answer in answers)
    people = sum(counts.values())

    return {answer: score_of(count, people) for answer, count in counts.items()}


def score_of(same: int, people: int) -> float:
    """Return the official accuracy (0 to 1) of an answer that `same` of the people gave."""
    if not same:
        return 0.0

    of_others = min(1.0, same / FULL_SCORE) * (people - same)
    of_own = min(1.0, (same - 1) / FULL_SCORE) * same

    return (of_others + of_own) / people
