"""Read lists of names of images."""

import io
from pathlib import Path

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json_value, read_regular, read_text, reading


def read_names(path: str, flag: str) -> list[str]:
    """Return the names in a file: a name on each line, a JSON list or NumPy's .npy; raises
    UsageError if there are none.
    """
    if path.endswith(".npy"):
        names = read_array(path, flag)
    elif path.endswith(".json"):
        names = read_json_value(path, flag)
    else:
        names = [line for line in map(str.strip, read_text(path, flag).split("\n")) if line]

    if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
        raise UsageError(f"{flag} {path}: expected a list of names or numbers of images")
    if not names:
        raise UsageError(f"{flag} {path}: lists no images")

    return [str(name) for name in names]


def read_array(path: str, flag: str) -> list[int] | list[str]:
    """Return the numbers or texts in an array of NumPy's."""
    try:
        with reading(path):
            content = io.BytesIO(read_regular(Path(path)))
        return np.lib.format.read_array(content, allow_pickle=False).tolist()
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path} ({error.strerror})") from error
    except (ValueError, EOFError) as error:
        raise UsageError(f"{flag} {path}: not an array of NumPy's ({error})") from error
