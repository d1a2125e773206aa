"""Read pickles of lists, dictionaries, texts and numbers, in which some data sets are published."""

import io
import pickle
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_regular, reading


class PlainUnpickler(pickle.Unpickler):
    """Read a pickle in which nothing can be called, because no name is looked up, not even those of
    arrays, which pickles of features may name.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name."""
        raise pickle.UnpicklingError(f"it names {module[:40]}.{name[:40]}")


def read_plain_pickle(path: str, flag: str) -> Any:
    """Read a pickle of plain values; raises UsageError naming the flag for anything else."""
    try:
        with reading(path):
            content = read_regular(Path(path))
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path} ({error.strerror})") from error

    try:
        return PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle may raise almost anything
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"{flag} {path}: not a pickle of plain lists, texts and numbers ({reason}); give the"
            " published file, or the same as JSON"
        ) from error
