"""Read GQA's official files: questions by id, each with one answer, and the choices they allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import check_entry, check_optional

KEYS = {"imageId": (str, int), "question": str}
OPTIONAL = {"answer": str, "types": dict, "groups": dict, "entailed": list}
GROUPS = {"global": str}
UNUSED = ("annotations", "semanticStr", "fullAnswer", "equivalent")
NO_STEPS = ("exist", "query: name", "choose name")  # operations that count as no step


@dataclass(frozen=True, slots=True)
class GqaFacts:
    """Hold what the metrics need of a question: its types, steps and words, the group of answers it
    belongs to, and the questions whose answers follow from its own.
    """

    structural: str
    semantic: str
    detailed: str
    steps: int
    words: int
    group: str | None
    entailed: tuple[str, ...]
    balanced: bool


def read_questions(
    paths: Sequence[str], corpus: Corpus, balanced: bool = False, whole: bool = False
) -> Records:
    """Read questions, with their answers if the files have them; `balanced`: only those that are.

    Raises UsageError that names file and question if a key is missing or of another kind. Questions
    without text or without an image in the corpus are dropped and counted; if `whole`, that raises
    UsageError.
    """
    if not paths:
        raise UsageError("--questions is missing; give train_balanced_questions.json of GQA")

    records = [
        record_of(number, entry)
        for path in paths
        for number, entry in entries_of(path)
        if not balanced or entry.get("isBalanced", True)
    ]
    if balanced and not records:
        raise UsageError(f"--balanced: no question of {', '.join(paths)} is balanced")

    return place_in(corpus, ", ".join(paths), records, whole)


def entries_of(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, question) of a file."""
    document = read_json(path, "--questions", keep=smaller)
    for number, entry in document.items():
        where = f"{path}: question {number}"
        check_entry(entry, KEYS, where)
        check_optional(entry, OPTIONAL, where)
        check_optional(entry.get("groups") or {}, GROUPS, f"{where}: groups")

    return list(document.items())


def smaller(entry: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a question what nothing here needs, and count its steps: files of all questions
    would fill the memory.
    """
    for name in UNUSED:
        entry.pop(name, None)

    if isinstance(entry.get("semantic"), list):
        entry["steps"] = steps_of(entry.pop("semantic"))

    return entry


def steps_of(operations: Sequence[Any]) -> int:
    """Count the reasoning steps of a question as the official evaluation does."""
    texts = [
        f"{operation.get('operation')}: {operation.get('argument')}"
        for operation in operations
        if isinstance(operation, dict)
    ]
    return sum(not any(name in text for name in NO_STEPS) for text in texts)


def record_of(number: str, entry: dict[str, Any]) -> Record | Rejected:
    """Return a question as a record, or (id, reason) if it cannot be used.

    Answers are never normalised: the official evaluation compares them to the letter.
    """
    text = entry["question"]
    if not text.strip():
        return number, "the question has no text"

    types = entry.get("types") or {}
    groups = entry.get("groups") or {}
    facts = GqaFacts(
        str(types.get("structural") or ""),
        str(types.get("semantic") or ""),
        str(types.get("detailed") or ""),
        int(entry.get("steps", 0)),
        len(text.split()),
        groups.get("global"),
        tuple(str(other) for other in entry.get("entailed") or () if str(other) != number),
        bool(entry.get("isBalanced", True)),
    )
    answer = entry.get("answer")
    answers = {} if answer is None else {answer: 1.0}

    return Record(number, (text,), (str(entry["imageId"]),), answers, facts)


def read_choices(path: str) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Read the answers that are valid, and those that are plausible, for each question."""
    found = {}
    for number, entry in read_json(path, "--choices").items():
        where = f"{path}: question {number}"
        check_entry(entry, {"valid": list, "plausible": list}, where)
        lists = entry["valid"], entry["plausible"]
        if not all(isinstance(answer, str) for answers in lists for answer in answers):
            raise UsageError(f"{where}: a choice is not a text")
        found[number] = frozenset(lists[0]), frozenset(lists[1])

    return found
