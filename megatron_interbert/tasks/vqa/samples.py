"""Read VQA's official files: questions, and ten answers to each."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.image_finder import coco_name
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import check_entry, whole_number
from megatron_interbert.tasks.vqa.answers import normalise_answer, soft_scores

COCO = "mscoco"
# Questions of test-dev are about images of the whole test set.
IMAGES_OF = {"test-dev2015": "test2015"}
QUESTION_KEYS = {"question_id": (int, str), "image_id": (int, str), "question": str}


@dataclass(frozen=True, slots=True)
class VqaFacts:
    """Hold what people answered to a question, the main one of these answers, normalised, and the
    types that accuracies are reported by; all are empty if the file does not say.
    """

    said: tuple[str, ...]
    question_type: str
    answer_type: str
    main: str = ""


Answered = Mapping[int, VqaFacts]  # by question id


def read_questions(
    questions: Sequence[str], answered: Answered | None, corpus: Corpus, whole: bool = False
) -> Records:
    """Read questions with the answers to them (see `read_annotations`); without, questions alone.

    Raises UsageError that names file and entry if a key is missing or of another kind. Questions
    are dropped and counted if they have no text or no image in the corpus or, given annotations, no
    answers; if `whole`, that raises UsageError, and so does a file of a part of the test set.
    """
    if not questions:
        raise UsageError("--questions is missing; give v2_OpenEnded_.._questions.json of VQA")

    records = [
        record_of(entry, name, answered)
        for path in questions
        for entry, name in entries_of(path, whole)
    ]

    return place_in(corpus, ", ".join(questions), records, whole)


def entries_of(path: str, whole: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (question, the name of its image) of a file."""
    document = read_json(path, "--questions")
    listed = document.get("questions")
    if not isinstance(listed, list):
        raise UsageError(f"--questions {path}: has no list 'questions'; give a file of VQA")

    subset = str(document.get("data_subtype") or "")
    if whole and subset in IMAGES_OF:
        raise UsageError(
            f"--questions {path}: {subset} is a part of the test set, but the server wants answers"
            " to all of it; give v2_OpenEnded_mscoco_test2015_questions.json"
        )

    subset = IMAGES_OF.get(subset, subset)
    of_coco = document.get("data_type", COCO) == COCO and subset

    for number, entry in enumerate(listed):
        where = f"{path}: question {number}"
        check_entry(entry, QUESTION_KEYS, where)
        entry["question_id"] = whole_number(entry, "question_id", where)
        image = str(entry["image_id"])
        is_number = image.isascii() and image.isdigit()
        yield entry, coco_name(image, subset) if of_coco and is_number else image


def record_of(entry: dict[str, Any], image: str, answered: Answered | None) -> Record | Rejected:
    """Return a question as a record, or (id, reason) if it cannot be used."""
    number = entry["question_id"]
    if not entry["question"].strip():
        return str(number), "the question has no text"
    if answered is None:
        return Record(str(number), (entry["question"],), (image,), {})

    facts = answered.get(number)
    if facts is None:
        return str(number), "no annotation answers it"
    if not facts.said:
        return str(number), "its annotation has no answers"

    return Record(str(number), (entry["question"],), (image,), soft_scores(facts.said), facts)


def read_annotations(paths: Sequence[str]) -> Answered | None:
    """Read the answers to questions; None if there are no files."""
    if not paths:
        return None

    found: dict[int, VqaFacts] = {}

    for path in paths:
        document = read_json(path, "--annotations")
        listed = document.get("annotations")
        if not isinstance(listed, list):
            swapped = " (it has 'questions': are both files swapped?)" * ("questions" in document)
            raise UsageError(
                f"--annotations {path}: has no list 'annotations'{swapped}; give a file of VQA"
            )

        for number, entry in enumerate(listed):
            where = f"{path}: annotation {number}"
            check_entry(entry, {"question_id": (int, str), "answers": list}, where)
            said = entry["answers"]
            if not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in said):
                raise UsageError(f"{where}: expected an object with 'answer' for each person")

            texts = tuple(answer["answer"] for answer in said)
            found[whole_number(entry, "question_id", where)] = VqaFacts(
                texts,
                str(entry.get("question_type") or ""),
                str(entry.get("answer_type") or ""),
                main_answer(entry.get("multiple_choice_answer"), texts),
            )

    return found


def main_answer(named: Any, said: Sequence[str]) -> str:
    """Return the normalised main answer to a question: the one that the file names
    (`multiple_choice_answer`), else the most frequent one.
    """
    if isinstance(named, str):
        return normalise_answer(named)
    if not said:
        return ""

    return Counter(map(normalise_answer, said)).most_common(1)[0][0]


def main_answers(every: Iterable[Answered]) -> Counter[str]:
    """Count the questions whose main answer each normalised answer is."""
    return Counter(facts.main for answered in every for facts in answered.values() if facts.said)
