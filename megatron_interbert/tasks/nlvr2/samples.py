"""Read NLVR2's JSON lines: a statement about a left and a right image, and whether it is true."""

from collections.abc import Sequence
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import read_records

CLASSES = ("False", "True")
PARTS = 4  # of an identifier: split, set, pair, statement


def read_statements(paths: Sequence[str], corpus: Corpus, whole: bool = False) -> Records:
    """Read statements with their labels, if the files have them. Facts are the group of statements
    that must all be right to be consistent.

    Raises UsageError that names the line if an identifier or a label is not NLVR2's. Statements
    without text or without their images in the corpus are dropped and counted; if `whole`, that
    raises UsageError.
    """
    if not paths:
        raise UsageError("--annotations is missing; give train.json, dev.json or .. of NLVR2")

    keys = {"identifier": str, "sentence": str}
    records = [
        record_of(record, where)
        for path in paths
        for where, record in read_records(path, "--annotations", keys)
    ]

    return place_in(corpus, ", ".join(paths), records, whole)


def record_of(entry: dict[str, Any], where: str) -> Record | Rejected:
    """Return a statement as a record, or (id, reason) if it cannot be used."""
    name = entry["identifier"]
    parts = name.split("-")
    if len(parts) != PARTS or not all(parts):
        raise UsageError(f"{where}: identifier '{name}', expected SPLIT-SET-PAIR-STATEMENT")
    if not entry["sentence"].strip():
        return name, "the statement has no text"

    label = str(entry["label"]).capitalize() if entry.get("label") not in (None, "") else ""
    if label not in ("", *CLASSES):
        raise UsageError(f"{where}: label '{entry['label']}', expected True or False")

    split, group, pair, statement = parts
    images = tuple(f"{split}-{group}-{pair}-img{side}" for side in (0, 1))
    answers = {label: 1.0} if label else {}

    return Record(name, (entry["sentence"],), images, answers, f"{split}-{group}-{statement}")
