"""Read VCR annotations, find their images in one or two region stores, and make the eight pairs of
each question.

Q->A    [CLS] question [SEP] answer [SEP]                     one pair for each of four answers
QA->R   [CLS] question right-answer [SEP] rationale [SEP]     one pair for each of four rationales

Token types are 0 up to the first [SEP], 1 after it. A reference to an object becomes its class
name, one to a person a neutral first name. Regions are the annotated boxes, then the detector's.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory, read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text
from megatron_interbert.tasks.image_finder import image_numbers, shown_ids
from megatron_interbert.tasks.pairs import Text, frame, pair_fields
from megatron_interbert.tasks.two_stores import join_regions
from megatron_interbert.tasks.vcr.config import VcrConfig

# Neutral first names, given to the persons of an image in order.
NAMES = (
    "Casey",
    "Riley",
    "Jessie",
    "Jackie",
    "Avery",
    "Jaime",
    "Peyton",
    "Kerry",
    "Jody",
    "Kendall",
    "Skyler",
    "Frankie",
    "Pat",
    "Quinn",
)
MOST_DIGITS = 12  # of a number that names an image
FIRST_NUMBER = {"train": 0, "val": 1_000_000, "test": 2_000_000}
OPTIONS = 4
NEEDED = ("objects", "question", "answer_choices", "rationale_choices", "img_fn", "annot_id")


@dataclass
class Question:
    """Hold one annotation with names in place of references: texts, labels (-1 if a test file has
    none), and image numbers in both stores (-1: none).
    """

    annot_id: str
    question: str
    answers: list[str]
    rationales: list[str]
    answer_label: int
    rationale_label: int
    objects: list[str]
    image_names: list[str]
    annotated: int = -1
    detected: int = -1


@dataclass
class Questions:
    """Hold the usable questions of a file and, for each reason, how many were dropped and the first
    of those.
    """

    path: str
    items: list[Question]
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Return whether all questions have both labels."""
        return all(min(q.answer_label, q.rationale_label) >= 0 for q in self.items)

    def drop(self, reason: str, annot_id: str) -> None:
        """Count a question that cannot be used, with the reason."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, annot_id)

    def report(self) -> str:
        """Return a line such as `PATH: 120 questions; dropped 3: REASON (first: train-7)`."""
        why = "".join(
            f"; dropped {count}: {reason} (first: {self.examples[reason]})"
            for reason, count in self.dropped.items()
        )
        return f"{self.path}: {len(self.items)} questions{why}"


def read_questions(path: str, stores: "VcrImages", whole: bool = False) -> Questions:
    """Read a JSON Lines file of VCR annotations.

    Unusable questions are dropped and counted; if `whole`, because every one must be answered, they
    raise UsageError. So does a line that is not a JSON object or lacks a key, or a file without
    usable questions.
    """
    found = Questions(path, [])

    for number, line in enumerate(read_text(path, "VCR annotations").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            missing = [name for name in NEEDED if name not in record]
        except (ValueError, RecursionError, TypeError) as error:
            raise UsageError(
                f"{path}: line {number} is not a JSON object ({error}); give a jsonl of VCR"
            ) from error

        if missing:
            raise UsageError(f"{path}: line {number} has no '{missing[0]}'; give a jsonl of VCR")
        try:
            question = parse_question(record)
            stores.place(question)
            found.items.append(question)
        except BadQuestion as error:
            if whole:
                raise UsageError(
                    f"{path}: line {number} ({record['annot_id']}): {error}; every question must be"
                    " answered"
                ) from error

            found.drop(str(error), str(record["annot_id"]))

    if not found.items:
        raise UsageError(
            f"{found.report()}; nothing is left: give stores that hold the images of these"
            " annotations (for validation: --valid-data-path, --valid-annotated-path)"
        )

    return found


class BadQuestion(ValueError):
    """Represent why a question cannot be used.

    The text holds no details of the question, because drops are counted by it.
    """


def parse_question(record: dict[str, Any]) -> Question:
    """Parse one annotation.

    Raises BadQuestion for a reference to a missing object, a number of options other than four, an
    empty text, an invalid label or a missing image name.
    """
    objects = record["objects"]
    choices = (record["answer_choices"], record["rationale_choices"])
    if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise BadQuestion("objects are not a list of names")

    persons = {
        index: number
        for number, index in enumerate(i for i, name in enumerate(objects) if name == "person")
    }
    names = [
        NAMES[persons[i] % len(NAMES)] if i in persons else name for i, name in enumerate(objects)
    ]
    if any(not isinstance(options, list) or len(options) != OPTIONS for options in choices):
        raise BadQuestion("not four options")

    answers, rationales = ([render(tokens, names) for tokens in options] for options in choices)
    labels = [record.get("answer_label", -1), record.get("rationale_label", -1)]
    if any(not isinstance(label, int) or not -1 <= label < OPTIONS for label in labels):
        raise BadQuestion("label outside 0 to 3")

    file = Path(str(record["img_fn"]))
    if not file.name:
        raise BadQuestion("img_fn names no image")

    img_id = str(record.get("img_id", ""))
    image_names = [
        *([img_id] if img_id else []),
        *numbers_of(img_id),
        str(file),
        str(file.with_suffix("")),
        file.stem,
    ]

    return Question(
        str(record["annot_id"]),
        render(record["question"], names),
        answers,
        rationales,
        *labels,
        objects,
        list(dict.fromkeys(image_names)),
    )


def numbers_of(img_id: str) -> list[str]:
    """Return the number by which ViLBERT's features name an image: n for train-n, 1000000 + n for
    val-n and 2000000 + n for test-n; none for other ids.
    """
    split, _, number = img_id.partition("-")
    plain = number.isascii() and number.isdigit() and len(number) < MOST_DIGITS
    if split not in FIRST_NUMBER or not plain:
        return []

    return [str(FIRST_NUMBER[split] + int(number))]


def render(tokens: Any, names: Sequence[str]) -> str:
    """Join words to a text, with a reference [i, j] as `name and name`.

    Raises BadQuestion if the text is empty or a reference names no object.
    """
    words = []
    if not isinstance(tokens, list):
        raise BadQuestion("text is not a list of words")
    for token in tokens:
        if isinstance(token, list):
            if not all(isinstance(i, int) and 0 <= i < len(names) for i in token):
                raise BadQuestion("reference to an object that does not exist")
            words.append(" and ".join(names[i] for i in token))
        else:
            words.append(str(token))

    text = " ".join(words)
    if not text.strip():
        raise BadQuestion("empty text")

    return text


class VcrImages:
    """Read the regions of images: the annotated boxes first, then the detector's; one of the two
    stores may be missing.
    """

    def __init__(self, annotated: Corpus | None, detected: Corpus | None, max_regions: int) -> None:
        if annotated is None and detected is None:
            raise UsageError(
                "--data-path and --annotated-path are both missing; give a region store of the"
                " images"
            )

        self.annotated = annotated
        self.detected = detected
        self.max_regions = max_regions
        self.feature_dim = (annotated or detected).feature_dim
        self._names = {
            id(corpus): image_numbers(corpus)
            for corpus in (annotated, detected)
            if corpus is not None
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": {}}  # needed only while annotations are read

    def place(self, question: Question) -> None:
        """Set the numbers of a question's image in the stores that are open.

        Raises BadQuestion if the image is missing in one of them, or has another number of
        annotated boxes than the question has objects.
        """
        for kind, corpus in (("annotated", self.annotated), ("detected", self.detected)):
            if corpus is None:
                continue

            names = self._names[id(corpus)]
            number = next((names[name] for name in question.image_names if name in names), None)
            if number is None:
                raise BadQuestion(f"its image is not in the store of {kind} regions")

            setattr(question, kind, number)

        if self.annotated is not None and self.annotated.region_counts[question.annotated] != len(
            question.objects
        ):
            raise BadQuestion("the numbers of annotated boxes and of objects differ")

    def id_of(self, question: Question) -> str:
        """Return the id of a question's image in the first of the stores that are open."""
        if self.annotated is not None:
            return shown_ids(self.annotated, [question.annotated])[0]

        return shown_ids(self.detected, [question.detected])[0]

    def read(self, questions: Sequence[Question]) -> RegionBatch:
        """Read the regions of the questions' images, one image per question; boxes are shares of
        the image.
        """
        parts = []

        for kind, corpus in (("annotated", self.annotated), ("detected", self.detected)):
            if corpus is not None:
                regions = read_regions(
                    corpus, np.array([getattr(q, kind) for q in questions]), self.max_regions
                )
                parts.append((regions.features, regions.locations()[:, :4], regions.offsets))

        return join_regions(parts, self.max_regions)


class VcrTexts:
    """Tokenise questions with their answers and rationales."""

    def __init__(
        self, tokenizer: CaptionTokenizer, max_tokens: int, max_rationale_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_rationale_tokens = max_rationale_tokens

    def answers(self, question: Question) -> list[Text]:
        """Return the four texts of Q->A: the question with each answer."""
        context, *options = self._pieces([question.question, *question.answers])
        return [frame([context, option], self.tokenizer, self.max_tokens) for option in options]

    def rationales(self, question: Question, answer: int) -> list[Text]:
        """Return the four texts of QA->R: the question and one answer with each rationale."""
        asked, answered, *options = self._pieces(
            [question.question, question.answers[answer], *question.rationales]
        )
        context = np.concatenate([asked, answered])

        return [
            frame([context, option], self.tokenizer, self.max_rationale_tokens)
            for option in options
        ]

    def _pieces(self, texts: list[str]) -> list[np.ndarray]:
        tokens = self.tokenizer.encode_batch(texts)
        return np.split(tokens.ids, tokens.offsets[1:-1])


class VcrSet:
    """Hold the training questions and their order; the batch rows of each are its four answers,
    then its four rationales given the right answer.
    """

    def __init__(
        self, questions: Questions, images: VcrImages, texts: VcrTexts, config: VcrConfig
    ) -> None:
        self.questions = questions.items
        self.images = images
        self.texts = texts
        self.config = config

        if not questions.labelled:
            raise UsageError(
                f"{questions.path}: questions without labels cannot be trained on; give train.jsonl"
            )

        partitions = config.fit_partitions(len(self.questions))
        self.order = SampleOrder([np.arange(len(self.questions))], partitions, config.seed)
        self.feature_dim = images.feature_dim

    @property
    def most_rows(self) -> int:
        """Return the largest number of regions that a micro-batch can have."""
        return 2 * OPTIONS * self.config.micro_batch_size * self.config.max_regions

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch of 8 B pairs, for (epoch, sample) pairs [B].

        `labels` [2 B] are the right answer and the right rationale of each question.
        """
        questions = [self.questions[sample] for _, sample in pairs]
        texts = [
            text
            for q in questions
            for text in (*self.texts.answers(q), *self.texts.rationales(q, q.answer_label))
        ]
        image_of = np.repeat(np.arange(len(questions)), 2 * OPTIONS)
        fields = pair_fields(
            texts, self.images.read(questions), image_of, self.feature_dim, allocate
        )
        labels = np.array(
            [label for q in questions for label in (q.answer_label, q.rationale_label)]
        )

        return {**fields, "labels": labels, "sample_ids": np.array([sample for _, sample in pairs])}
