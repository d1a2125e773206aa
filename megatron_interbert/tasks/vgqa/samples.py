"""Read question_answers.json of Visual Genome: images with their questions, each with an answer."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json_value
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import check_entry
from megatron_interbert.tasks.vqa.answers import normalise_answer

KEYS = {"qa_id": int, "image_id": (int, str), "question": str, "answer": str}


def read_questions(
    paths: Sequence[str], part: str, minval: int, corpus: Corpus, whole: bool = False
) -> Records:
    """Read questions with their normalised answers: all, or (`part` train or valid) those of all
    but the last `minval` images by id, or of these.
    """
    if not paths:
        raise UsageError("--questions is missing; give question_answers.json of Visual Genome")

    images = sorted(
        (entry for path in paths for entry in images_of(path)), key=lambda image: int(image["id"])
    )
    if not images:
        raise UsageError(f"--questions {', '.join(paths)}: holds no images with questions")
    if minval >= len(images):
        raise UsageError(
            f"--minval {minval}: there are {len(images)} images; give a smaller number"
        )
    if minval:
        images = images[:-minval] if part == "train" else images[-minval:]

    records = [record_of(entry) for image in images for entry in image["qas"]]

    return place_in(corpus, ", ".join(paths), records, whole)


def images_of(path: str) -> Iterator[dict[str, Any]]:
    """Yield the images of a file, each with its questions."""
    document = read_json_value(path, "--questions")
    if not isinstance(document, list):
        raise UsageError(f"--questions {path}: expected a list of images; give a file of VG's QA")

    for number, image in enumerate(document):
        where = f"{path}: image {number}"
        check_entry(image, {"id": int, "qas": list}, where)
        for place, entry in enumerate(image["qas"]):
            check_entry(entry, KEYS, f"{where}, question {place}")
        yield image


def record_of(entry: dict[str, Any]) -> Record | Rejected:
    """Return a question as a record, or (id, reason) if it cannot be used."""
    number = str(entry["qa_id"])
    answer = normalise_answer(entry["answer"])
    if not entry["question"].strip():
        return number, "the question has no text"
    if not answer:
        return number, "it has no answer"

    return Record(number, (entry["question"],), (str(entry["image_id"]),), {answer: 1.0})
