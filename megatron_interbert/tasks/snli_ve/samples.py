"""Read SNLI-VE's JSON lines: a statement, and whether the picture entails it, contradicts it or
does not tell. The caption in `sentence1` is not read: it would give the picture away.
"""

from collections.abc import Sequence
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import read_records

CLASSES = ("contradiction", "neutral", "entailment")
# as the generator, the authors' README and VOLTA's files spell it; other capitals and underscores
# are accepted as well
IMAGE_KEYS = ("Flickr30K_ID", "Flickr30kID", "Flikr30kID")
PLAIN_KEYS = ("flickr30kid", "flikr30kid")
UNDECIDED = "-"  # the label of pairs on which people did not agree


def read_pairs(paths: Sequence[str], corpus: Corpus, whole: bool = False) -> Records:
    """Read statements with their labels, if the files have them.

    Raises UsageError that names the line if it has no image or another label. Statements without
    text, without agreement on a label or without an image in the corpus are dropped and counted; if
    `whole`, that raises UsageError.
    """
    if not paths:
        raise UsageError("--annotations is missing; give snli_ve_train.jsonl, .._dev or .._test")

    keys = {"sentence2": str, "pairID": (str, int)}
    records = [
        record_of(record, where)
        for path in paths
        for where, record in read_records(path, "--annotations", keys)
    ]

    return place_in(corpus, ", ".join(paths), records, whole)


def record_of(entry: dict[str, Any], where: str) -> Record | Rejected:
    """Return a statement as a record, or (id, reason) if it cannot be used."""
    number = str(entry["pairID"])
    named = (entry[key] for key in entry if key.casefold().replace("_", "") in PLAIN_KEYS)
    image = next((str(name) for name in named if isinstance(name, str | int) and name != ""), "")
    if not image:
        raise UsageError(f"{where} has none of {', '.join(IMAGE_KEYS)}, which name the image")
    if not entry["sentence2"].strip():
        return number, "the statement has no text"

    label = entry.get("gold_label")
    if label == UNDECIDED:
        return number, "people did not agree on a label"
    if label not in (None, "", *CLASSES):
        raise UsageError(f"{where}: label '{label}', expected {', '.join(CLASSES)}")

    return Record(number, (entry["sentence2"],), (image,), {label: 1.0} if label else {})
