"""Read the captions of a whole store through memory maps: texts, images, languages, and token ids
if the store has them.

So every process can draw any caption of the corpus, while it reads region features only from its
rank's own partitions.
"""

import os
from pathlib import Path

import numpy as np

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.manifest import CAPTIONS, TOKENS
from megatron_interbert.data.text import TokenBatch
from megatron_interbert.errors import UsageError


class CaptionFile:
    """Represent `captions.h5` and, if present, `tokens.h5` of a store.

    Cheap to pickle: each process maps the files itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        maps = _map_all(folder / CAPTIONS, ("text", "offsets", "image", "language"))
        self.text, self.offsets, self.image, self._language = maps

        if (
            len(self.offsets) != len(self.image) + 1
            or len(self._language) != len(self.image)
            or self.offsets[-1] != len(self.text)
        ):
            raise UsageError(
                f"{folder / CAPTIONS}: texts, offsets, images and languages differ in length;"
                " rebuild the store"
            )

        self.tokens: TokenBatch | None = None
        self.token_vocabulary = ""

        if (folder / TOKENS).is_file():
            with Hdf5File(folder / TOKENS) as file:
                self.token_vocabulary = str(file.attribute("vocabulary") or "")

            self.tokens = TokenBatch(*_map_all(folder / TOKENS, ("ids", "word_starts", "offsets")))
            captions = len(self.tokens.offsets) - 1
            if captions != len(self) or self.tokens.offsets[-1] != len(self.tokens.ids):
                raise UsageError(
                    f"{folder / TOKENS}: tokens of {captions} captions, expected {len(self)};"
                    " rebuild the store"
                )

    def __len__(self) -> int:
        return len(self.image)

    def __reduce__(self) -> tuple:
        return CaptionFile, (self.folder,)

    def __getitem__(self, index: int) -> str:
        try:
            return bytes(self.text[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.folder / CAPTIONS}: caption {index} is not UTF-8 ({error}); restore the"
                " file"
            ) from error

    def languages(self) -> np.ndarray:
        """Return the language tag of each caption, an object array of str [captions]; an empty
        string if unknown.
        """
        with Hdf5File(self.folder / CAPTIONS) as file:
            listed = file.attribute("languages")
            if listed is None:
                raise KeyError("attribute 'languages' is missing")
            names = [n.decode() if isinstance(n, bytes) else str(n) for n in listed]
            return np.array(names, dtype=object)[self._language]

    def image_regions(self) -> np.ndarray | None:
        """Return the number of regions of each image, int32 [images]; None for older stores, which
        do not hold it.
        """
        with Hdf5File(self.folder / CAPTIONS) as file:
            return file["image_regions"][:] if "image_regions" in file else None


def _map_all(path: Path, names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    with Hdf5File(path) as file:
        return tuple(_map(file, name) for name in names)


def _map(file: Hdf5File, name: str) -> np.ndarray:
    """Map a one-dimensional dataset of integers read-only; read it into memory if it is empty or
    not contiguous.
    """
    dataset = file[name]
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
        raise UsageError(
            f"{file.path}: dataset '{name}' is {dataset.dtype} {list(dataset.shape)}, expected"
            " one-dimensional integers; rebuild the store"
        )

    offset = dataset.id.get_offset()
    if dataset.size == 0 or offset is None:
        return dataset[:]

    # the file that was checked, even if another one has its name by now
    with open(os.dup(file.bytes.descriptor), "rb") as handle:
        return np.memmap(handle, dataset.dtype, "r", offset, dataset.shape)
