"""Hold questions about the images of a corpus, which pretraining reads beside its captions."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Questions:
    """Hold n questions and the numbers of their images [n].

    Their right answers stand one after another, each with a score; those of question i begin at
    offsets[i] (offsets [n + 1]). A question may have none that is known.
    """

    texts: list[str]
    images: np.ndarray
    answers: np.ndarray
    scores: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Draw a right answer of each of some questions [B] in proportion to its score, from
        uniform numbers [B] (LXMERT); -1 where none is known: int64 [B].
        """
        sums = np.concatenate([[0.0], np.cumsum(self.scores, dtype=np.float64)])
        first, last = self.offsets[rows], self.offsets[rows + 1]
        wanted = sums[first] + draws * (sums[last] - sums[first])
        place = np.searchsorted(sums, wanted, side="right") - 1
        found = np.full(len(rows), -1)
        known = sums[last] > sums[first]
        found[known] = self.answers[np.clip(place, first, last - 1)[known]]

        return found
