"""Tokenise the texts of many samples once, and frame some of them for a batch."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.data.text import CaptionTokenizer, TokenBatch
from megatron_interbert.tasks.pairs import Text, frame


class FramedTexts:
    """Hold the tokens of n samples of one or more pieces of text each; `inputs` frames some."""

    def __init__(
        self, texts: Sequence[Sequence[str]], tokenizer: CaptionTokenizer, max_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.count = len(texts)
        self.parts: list[TokenBatch] = [
            tokenizer.encode_batch(list(pieces)) for pieces in zip(*texts, strict=True)
        ]

    def lengths(self) -> np.ndarray:
        """Return the length of each sample in tokens, int64 [n], with [CLS] and [SEP], cut to
        `max_tokens`.
        """
        return np.minimum(
            sum(np.diff(part.offsets) for part in self.parts) + 1 + len(self.parts), self.max_tokens
        )

    def inputs(self, rows: Sequence[int]) -> list[Text]:
        """Return (ids, types) of some samples: [CLS] a [SEP] with types 0, then b [SEP] with types
        1.
        """
        result = []
        for row in rows:
            pieces = [part.ids[part.offsets[row] : part.offsets[row + 1]] for part in self.parts]
            result.append(frame(pieces, self.tokenizer, self.max_tokens))

        return result
