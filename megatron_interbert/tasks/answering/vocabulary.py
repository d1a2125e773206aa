"""Number the answers that a head can give."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json_value
from megatron_interbert.tasks.plain_pickles import read_plain_pickle


class AnswerList:
    """Hold the answers that a head can give, in the order of its outputs."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        self.numbers = {answer: number for number, answer in enumerate(self.answers)}

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, number: int) -> str:
        return self.answers[number]

    def known(self, scores: Mapping[str, float]) -> list[tuple[int, float]]:
        """Return (number, score) of those of some answers that the head can give."""
        return [(self.numbers[a], score) for a, score in scores.items() if a in self.numbers]


def frequent_answers(counted: Iterable[tuple[str, int]], least: int) -> AnswerList:
    """Return the answers with counts of `least` or more, most frequent first, equal ones by
    alphabet.
    """
    kept = sorted((-count, answer) for answer, count in counted if count >= least)
    return AnswerList([answer for _, answer in kept])


def read_answers(path: str, flag: str) -> AnswerList:
    """Read a file of answers: a list of them, or an object with the number of each, as LXMERT,
    UNITER (JSON) and VOLTA (pickles) publish theirs (label2ans, ans2label).

    Raises UsageError unless the numbers are 0, 1, .. without gaps and repeats.
    """
    is_pickle = path.endswith((".pkl", ".p"))
    value = read_plain_pickle(path, flag) if is_pickle else read_json_value(path, flag)
    answers = in_order(value, path) if isinstance(value, dict) else value
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UsageError(
            f"{flag} {path}: expected a list of answers, or an object with the number of each"
        )

    if not answers:
        raise UsageError(f"{flag} {path}: holds no answers")

    found = AnswerList(answers)
    if len(found.numbers) < len(found):
        again = next(a for n, a in enumerate(answers) if found.numbers[a] != n)
        raise UsageError(f"{flag} {path}: '{again}' occurs twice; each answer needs one number")

    return found


def in_order(numbers: dict[str, Any], path: str) -> list[str]:
    """Return answers in the order of their numbers; UsageError if these are not 0 to n - 1."""
    answers: list[str | None] = [None] * len(numbers)

    for answer, number in numbers.items():
        if type(number) is not int or not 0 <= number < len(numbers):
            raise UsageError(
                f"{path}: the number of '{answer}' is {number!r:.40}, expected 0 to"
                f" {len(numbers) - 1}"
            )
        if answers[number] is not None:
            raise UsageError(
                f"{path}: '{answers[number]}' and '{answer}' have the same number {number}"
            )
        answers[number] = answer

    return [answer for answer in answers if answer is not None]
