"""Read VQA's official files: questions, and ten answers to each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.image_finder import coco_name
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import check_entry
from megatron_interbert.tasks.vqa.answers import normalise_answer, soft_scores

COCO = "mscoco"
# Questions of test-dev are about images of the whole test set.
IMAGES_OF = {"test-dev2015": "test2015"}
QUESTION_KEYS = {"question_id": int, "image_id": (int, str), "question": str}


@dataclass(frozen=True, slots=True)
class VqaFacts:
    """Hold what people answered to a question, and the types that accuracies are reported by, empty
    if the file does not say.
    """

    said: tuple[str, ...]
    question_type: str
    answer_type: str


def read_questions(
    questions: Sequence[str], annotations: Sequence[str], corpus: Corpus, whole: bool = False
) -> Records:
    """Read questions with the answers to them; without annotations, questions alone.

    Raises UsageError that names file and entry if a key is missing or of another kind. Questions
    are dropped and counted if they have no text or no image in the corpus or, given annotations, no
    answers; if `whole`, that raises UsageError.
    """
    if not questions:
        raise UsageError("--questions is missing; give v2_OpenEnded_.._questions.json of VQA")

    answered = read_annotations(annotations)
    records = [
        record_of(entry, name, answered if annotations else None)
        for path in questions
        for entry, name in entries_of(path)
    ]

    return place_in(corpus, ", ".join(questions), records, whole)


def entries_of(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (question, the name of its image) of a file."""
    document = read_json(path, "--questions")
    listed = document.get("questions")
    if not isinstance(listed, list):
        raise UsageError(f"--questions {path}: has no list 'questions'; give a file of VQA")

    subset = str(document.get("data_subtype") or "")
    subset = IMAGES_OF.get(subset, subset)
    of_coco = document.get("data_type", COCO) == COCO and subset

    for number, entry in enumerate(listed):
        check_entry(entry, QUESTION_KEYS, f"{path}: question {number}")
        image = str(entry["image_id"])
        is_number = image.isascii() and image.isdigit()
        yield entry, coco_name(image, subset) if of_coco and is_number else image


def record_of(
    entry: dict[str, Any], image: str, answered: dict[int, VqaFacts] | None
) -> Record | Rejected:
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


def read_annotations(paths: Sequence[str]) -> dict[int, VqaFacts]:
    """Read the answers to questions, by question id."""
    found: dict[int, VqaFacts] = {}

    for path in paths:
        listed = read_json(path, "--annotations").get("annotations")
        if not isinstance(listed, list):
            raise UsageError(f"--annotations {path}: has no list 'annotations'; give a file of VQA")

        for number, entry in enumerate(listed):
            where = f"{path}: annotation {number}"
            check_entry(entry, {"question_id": int, "answers": list}, where)
            said = entry["answers"]
            if not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in said):
                raise UsageError(f"{where}: expected an object with 'answer' for each person")

            found[entry["question_id"]] = VqaFacts(
                tuple(answer["answer"] for answer in said),
                str(entry.get("question_type") or ""),
                str(entry.get("answer_type") or ""),
            )

    return found


def main_answers(paths: Sequence[str]) -> Counter[str]:
    """Count the questions whose main answer each normalised answer is: `multiple_choice_answer`, in
    files without it the most frequent one.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        for entry in read_json(path, "--annotations")["annotations"]:
            said = [normalise_answer(answer["answer"]) for answer in entry["answers"]]
            main = entry.get("multiple_choice_answer")
            if isinstance(main, str):
                counts[normalise_answer(main)] += 1
            elif said:
                counts[Counter(said).most_common(1)[0][0]] += 1

    return counts
