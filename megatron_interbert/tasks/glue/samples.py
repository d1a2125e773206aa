"""Read GLUE's official TSV files: one or two sentences, and a class or (STS-B) a score.

Fields are separated by tabs and never quoted. A row with too few fields or, in training, without
text is dropped and counted. A label outside the task's set is an error: otherwise a shifted column
would be trained on without anyone noticing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate, plain_memory
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text
from megatron_interbert.tasks.glue.config import GlueConfig
from megatron_interbert.tasks.pairs import NOTHING, pair_fields
from megatron_interbert.tasks.texts import FramedTexts

YES_NO = ("0", "1")
ENTAILS = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Format:
    """Hold the column names of a task's files.

    `without_header` lists the columns of files that have no header line.
    """

    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...] = YES_NO  # empty: the label is a number
    index: str = "index"  # in test files
    without_header: tuple[str, ...] = ()
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    submission: tuple[str, ...] = ()  # names of the prediction files; default: the task's name


PAIR = ("sentence1", "sentence2")
FORMATS = {
    "CoLA": Format(("sentence",), "label", without_header=("source", "label", "star", "sentence")),
    "SST-2": Format(("sentence",), "label"),
    "MRPC": Format(("#1 String", "#2 String"), "Quality"),
    "STS-B": Format(PAIR, "score", ()),
    "QQP": Format(("question1", "question2"), "is_duplicate", index="id"),
    "MNLI": Format(
        PAIR,
        "gold_label",
        ("contradiction", "entailment", "neutral"),
        dev=("dev_matched", "dev_mismatched"),
        test=("test_matched", "test_mismatched"),
        submission=("MNLI-m", "MNLI-mm"),
    ),
    "QNLI": Format(("question", "sentence"), "label", ENTAILS),
    "RTE": Format(PAIR, "label", ENTAILS),
    "WNLI": Format(PAIR, "label"),
}


@dataclass
class GlueRows:
    """Hold the rows of one file: n texts of one or two sentences, the index of each row, and labels
    [n] (int64 classes or float32 scores, empty for a test file).
    """

    path: str
    texts: list[tuple[str, ...]]
    labels: np.ndarray
    index: list[str]
    dropped: int = 0


def find_file(folder: str, task: str, split: str) -> str:
    """Return the path of a split's TSV file: SPLIT.tsv in the folder or its subfolder TASK, or
    TASK.SPLIT.tsv.

    Raises UsageError that lists the paths tried.
    """
    names = [
        Path(folder) / f"{split}.tsv",
        Path(folder) / task / f"{split}.tsv",
        Path(folder) / f"{task}.{split}.tsv",
    ]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise UsageError(
            f"--data-path {folder or '(not given)'}: none of {', '.join(map(str, names))} is there;"
            f" give the folder with the official {task} files"
        )

    return str(found)


def read_rows(path: str, task: str, training: bool = False) -> GlueRows:
    """Read a file of a task.

    Raises UsageError that names the column or line if a column is missing, a label is not one of
    the task's, a row of a test file is too short, or no row is left.
    """
    format = FORMATS[task]
    lines = read_text(path, f"{task}").lstrip("\ufeff").rstrip("\n").split("\n")
    header = tuple(name.strip() for name in lines[0].rstrip("\r").split("\t"))
    first = 1
    if format.without_header and format.texts[0] not in header:
        header = format.without_header
        first = 0

    has_labels = format.label in header
    _check_header(path, task, header, training)
    columns = [header.index(name) for name in format.texts]
    needed = max([*columns, *([header.index(format.label)] if has_labels else [])])
    rows = GlueRows(path, [], np.zeros(0), [])
    labels: list[float] = []

    for number, line in enumerate(lines[first:], first + 1):
        fields = line.rstrip("\r").split("\t")
        texts = tuple(fields[column].strip() for column in columns) if len(fields) > needed else ()
        if has_labels and (not texts or (training and not all(texts))):
            rows.dropped += 1
            continue

        if not texts:
            raise UsageError(
                f"{path}: line {number} has {len(fields)} fields, expected {len(header)}; every row"
                " of a test file needs a prediction"
            )

        if has_labels:
            labels.append(_label(fields[header.index(format.label)].strip(), format, path, number))

        has_index = format.index in header
        index = fields[header.index(format.index)] if has_index else str(number - first - 1)
        rows.texts.append(texts)
        rows.index.append(index)

    if not rows.texts:
        raise UsageError(f"{path}: no rows; give the official {task} file")
    if has_labels:
        rows.labels = np.array(labels, dtype=np.int64 if format.classes else np.float32)

    return rows


def _check_header(path: str, task: str, header: tuple[str, ...], training: bool) -> None:
    format = FORMATS[task]
    missing = [name for name in format.texts if name not in header]
    if missing:
        raise UsageError(
            f"{path}: no column '{missing[0]}' (found {', '.join(header[:12])}); give the"
            f" official {task} file"
        )

    if training and format.label not in header:
        raise UsageError(
            f"{path}: no column '{format.label}', so there is nothing to train on; give the"
            f" official {task} file"
        )


def _label(text: str, format: Format, path: str, number: int) -> float:
    if format.classes:
        if text not in format.classes:
            raise UsageError(
                f"{path}: line {number}: label '{text}', expected one of"
                f" {', '.join(format.classes)}"
            )

        return format.classes.index(text)

    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{path}: line {number}: score '{text}', expected a number") from None


class GlueSet:
    """Hold the training rows of a task and their order."""

    most_rows = 0

    def __init__(
        self, rows: GlueRows, tokenizer: CaptionTokenizer, config: GlueConfig, feature_dim: int = 1
    ) -> None:
        self.config = config
        self.labels = rows.labels
        self.feature_dim = feature_dim
        self.texts = FramedTexts(rows.texts, tokenizer, config.max_tokens)
        samples = np.arange(len(rows.texts))
        self.order = SampleOrder(
            [samples],
            config.fit_partitions(len(samples)),
            config.seed,
            lengths=self.texts.lengths(),
        )

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a text-only PackedBatch for (epoch, sample) pairs [B], with `labels`
        [B].
        """
        rows = [sample for _, sample in pairs]
        fields = pair_fields(self.texts.inputs(rows), None, NOTHING, self.feature_dim)
        return {**fields, "labels": self.labels[rows], "sample_ids": np.array(rows)}
