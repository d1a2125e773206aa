"""Answer from the text alone, or from the image alone: what a model must beat before its figures
mean that it has read both.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.placing import Records

SMOOTHING = 0.5  # added to each count of a word with an answer
KNOWN_TEXT = 5  # questions of one text from which on its own answers decide
RIDGE = 1.0
AT_ONCE = 256
MOST_REGIONS = 100


class TextOnly:
    """Answer texts by what was right for the same text or, where that is rare, by naive Bayes over
    its words and pairs of words.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.prior: Counter[str] = Counter()
        self.of_text: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self.of_word: dict[str, Counter[str]] = defaultdict(Counter)

        for record in records:
            answer = best_of(record)
            self.prior[answer] += 1
            self.of_text[record.texts][answer] += 1
            for word in words_of(record):
                self.of_word[word][answer] += 1

        self.answers = sorted(self.prior)
        self.counts = np.array([self.prior[answer] for answer in self.answers], np.float64)

    def answer(self, record: Record) -> str:
        """Return the answer to a sample."""
        seen = self.of_text.get(record.texts, Counter())
        if seen.total() >= KNOWN_TEXT:
            return min(seen, key=lambda answer: (-seen[answer], answer))

        scores = np.log(self.counts)
        for word in words_of(record):
            if word in self.of_word:
                found = self.of_word[word]
                having = np.array([found[answer] for answer in self.answers], np.float64)
                scores += np.log((having + SMOOTHING) / (self.counts + 2 * SMOOTHING))

        return self.answers[int(scores.argmax())]


def best_of(record: Record) -> str:
    """Return the answer to a sample with the best score."""
    return max(record.answers, key=lambda answer: record.answers[answer])


def words_of(record: Record) -> set[str]:
    """Return the words, and the pairs of words, of a sample's texts."""
    words = [f"{place}:{word}" for place, text in enumerate(record.texts) for word in text.split()]
    return {*words, *(" ".join(pair) for pair in pairwise(words))}


def answer_by_text(trained: Records, asked: Records) -> list[str]:
    """Return answers to samples from their texts alone, by those of the training samples."""
    model = TextOnly(trained.items)
    return [model.answer(record) for record in asked.items]


def answer_by_image(
    trained: Records, corpus: Corpus, asked: Records, asked_corpus: Corpus
) -> list[str]:
    """Return answers to samples from their images alone: linear regression of the training samples'
    answers on the mean features of their images and the classes seen there.
    """
    answers = sorted({best_of(record) for record in trained.items})
    numbers = {answer: number for number, answer in enumerate(answers)}
    inputs = looks_of(corpus, trained.images)
    wanted = np.zeros((len(answers), inputs.shape[1]))
    targets = np.array([numbers[best_of(record)] for record in trained.items])

    np.add.at(wanted, targets, inputs)
    squares = inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1])
    weights = np.linalg.solve(squares, wanted.T)
    scores = looks_of(asked_corpus, asked.images) @ weights

    return [answers[number] for number in scores.argmax(axis=1)]


def looks_of(corpus: Corpus, images: np.ndarray) -> np.ndarray:
    """Return, for the images [n, each] of samples, the mean features and the shares of classes of
    each, and a constant: float64 [n, each * (F + classes) + 1].
    """
    shown, place = np.unique(images, return_inverse=True)
    looks = np.zeros((len(shown), corpus.feature_dim + corpus.num_classes))

    for start in range(0, len(shown), AT_ONCE):
        some = shown[start : start + AT_ONCE]
        regions = read_regions(corpus, some, MOST_REGIONS)
        owner = np.repeat(np.arange(start, start + len(some)), regions.counts)
        counts = regions.counts[owner - start][:, None]
        np.add.at(looks[:, : corpus.feature_dim], owner, regions.features / counts)
        best = regions.class_ids[np.arange(len(owner)), regions.class_probs.argmax(axis=1)]
        np.add.at(looks, (owner, corpus.feature_dim + best), 1.0 / counts[:, 0])

    flat = looks[place.reshape(images.shape)].reshape(len(images), -1)

    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
