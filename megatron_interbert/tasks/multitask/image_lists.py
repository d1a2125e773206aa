"""Read lists of images that no task may train on."""

import io
from pathlib import Path

import numpy as np

from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json_value, read_regular, read_text, reading
from megatron_interbert.tasks.image_finder import coco_name

COCO = "coco:"  # before a file whose numbers are COCO's
SUBSETS = ("train2014", "val2014", "test2015")


def listed_images(files: str) -> set[str]:
    """Return the names of the images that comma-separated files list, a name on each line, a JSON
    list or NumPy's .npy. Numbers are Visual Genome's, or COCO's if `coco:` stands before the file.
    """
    found: set[str] = set()

    for file in split_paths(files):
        of_coco = file.startswith(COCO)
        names = read_names(file.removeprefix(COCO))
        found.update(named_by_coco(names, file) if of_coco else names)

    return found


def read_names(path: str) -> list[str]:
    """Return the names in a file; raises UsageError if there are none."""
    flag = "--exclude-images"
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


def named_by_coco(numbers: list[str], file: str) -> list[str]:
    """Return the names that images of COCO, given by number, have in each of its parts."""
    other = next((n for n in numbers if not (n.isascii() and n.isdigit())), None)
    if other is not None:
        raise UsageError(f"--exclude-images {file}: '{other[:60]}' is no number of COCO")

    return [coco_name(number, subset) for number in numbers for subset in SUBSETS]
