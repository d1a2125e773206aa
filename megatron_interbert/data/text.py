"""Tokenise captions with WordPiece, keeping track of the word that each piece belongs to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from megatron_interbert.data.chinese import one_form, word_begins
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.reading import read_text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class Tokens:
    """Hold a caption without [CLS] and [SEP]: ids [T], and the index of each piece's word [T]."""

    ids: np.ndarray
    words: np.ndarray


@dataclass
class TokenBatch:
    """Hold several captions end to end: ids [T] int32, whether each piece begins a word [T] uint8,
    offsets [captions + 1] int64.
    """

    ids: np.ndarray
    word_starts: np.ndarray
    offsets: np.ndarray

    def take(self, captions: np.ndarray, longest: int) -> "TokenBatch":
        """Return the first `longest` pieces of each of some captions [n], in the order given."""
        begin = self.offsets[captions]
        lengths = np.minimum(self.offsets[captions + 1] - begin, longest)
        ends = np.cumsum(lengths)
        rows = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            begin - (ends - lengths), lengths
        )

        return TokenBatch(
            self.ids[rows], self.word_starts[rows], np.concatenate([[0], ends]).astype(np.int64)
        )

    @staticmethod
    def join(parts: list["TokenBatch"]) -> "TokenBatch":
        """Concatenate batches."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        ids, starts = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "word_starts")
        )

        return TokenBatch(ids, starts, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class CaptionTokenizer:
    """Tokenise as BERT does (lower case, each Chinese character apart), with a given vocab.txt.

    `text_normalisation` is that of ModelConfig: "chinese" normalises texts first (data/chinese.py).
    `segmenter`: "jieba" joins characters to Chinese words, which are masked whole; the pieces stay
    the same.
    """

    def __init__(
        self, vocab_file: str, text_normalisation: str = "none", segmenter: str = "characters"
    ) -> None:
        if not Path(vocab_file).is_file():
            raise UsageError(
                f"--vocab-file {vocab_file}: no such file; give the WordPiece vocabulary of the"
                " model"
            )

        words = read_text(vocab_file, "--vocab-file").rstrip("\n").split("\n")
        words = [word.rstrip("\r") for word in words]
        vocabulary = {word: index for index, word in enumerate(words)}

        for name in SPECIAL:
            if name not in vocabulary:
                raise UsageError(
                    f"{vocab_file}: has no {name}, expected a BERT vocabulary with one entry per"
                    " line"
                )

        self.segmenter = segmenter
        if segmenter != "characters":
            word_begins("")  # raises if jieba is not installed

        self.vocab_file = str(vocab_file)
        self.words = words
        self.vocab_size = len(words)
        self.prepare = one_form if text_normalisation == "chinese" else str
        self.sha256 = file_sha256(vocab_file) + (
            "" if text_normalisation == "none" else f" {text_normalisation}"
        )
        self.pad, self.unknown, self.cls, self.sep, self.mask = (
            vocabulary[name] for name in SPECIAL
        )
        # Entries that may replace a masked piece at random: neither special nor unused ones.
        self.ordinary = np.array(
            [i for i, w in enumerate(words) if w and not (w.startswith("[") and w.endswith("]"))]
        )
        self._tokenizer = Tokenizer(
            WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
        )
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=True, handle_chinese_chars=True
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = decoders.WordPiece()

    def encode(self, caption: str, max_tokens: int) -> Tokens:
        """Encode a caption, truncated so that [CLS] and [SEP] still fit into `max_tokens`."""
        encoding = self._tokenizer.encode(self.prepare(caption), add_special_tokens=False)
        length = min(len(encoding.ids), max_tokens - 2)

        return Tokens(
            np.array(encoding.ids[:length], dtype=np.int64),
            np.array(encoding.word_ids[:length], dtype=np.int64),
        )

    def encode_batch(self, captions: list[str]) -> TokenBatch:
        """Encode captions without truncating them, without [CLS] and [SEP]."""
        prepared = [self.prepare(caption) for caption in captions]
        encodings = self._tokenizer.encode_batch(prepared, add_special_tokens=False)
        offsets = np.concatenate([[0], np.cumsum([len(e.ids) for e in encodings])]).astype(np.int64)
        ids = np.fromiter((i for e in encodings for i in e.ids), np.int32, offsets[-1])
        words = np.fromiter((w for e in encodings for w in e.word_ids), np.int64, offsets[-1])
        starts = np.ones(len(ids), dtype=np.uint8)
        starts[1:] = words[1:] != words[:-1]
        if self.segmenter == "jieba":
            starts &= self._begin_chinese_words(prepared, encodings)

        starts[offsets[:-1][np.diff(offsets) > 0]] = 1

        return TokenBatch(ids, starts, offsets)

    @staticmethod
    def _begin_chinese_words(texts: list[str], encodings: list) -> np.ndarray:
        """Mark each piece, uint8: 0 if it is a Chinese character inside a word, else 1."""
        found = []

        for text, encoding in zip(texts, encodings, strict=True):
            begins = word_begins(text)
            found += [
                begin in begins or not "\u4e00" <= text[begin] <= "\u9fff"
                for begin, _ in encoding.offsets
            ]

        return np.array(found, np.uint8)

    def decode(self, ids: list[int]) -> str:
        """Return the readable text of token ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)
