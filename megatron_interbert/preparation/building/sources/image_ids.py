"""Read the file that names the rows of an HDF5 file (--image-ids)."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.pickles.reading import MAX_PICKLE, loads
from megatron_interbert.preparation.building.sources.names import renamed
from megatron_interbert.reading import read_text

ENDS = ("imgid2idx.json", "imgid2idx.pkl")


@dataclass
class RowNames:
    """Hold the name of the image of each row ("": none), and what the file says beyond: numbers of
    regions by row, (width, height) by name.
    """

    ids: list[str]
    counts: dict[int, int] = field(default_factory=dict)
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)


def names_beside(path: str) -> str:
    """Return the path of the imgid2idx file of an HDF5 file, beside it, or "" if there is none."""
    place = Path(path)
    names = [place.with_name(f"{place.stem}_{end}") for end in ENDS]

    return next((str(name) for name in names if name.is_file()), "")


def read_image_ids(path: str, images: int, trust_pickle: bool, source: str = "") -> RowNames:
    """Read the image names by row: one per line, a JSON list, id -> row as JSON or pickle
    (imgid2idx), or GQA's id -> {idx, file, width, height, objectsNum} for the file `source`.

    Rows without a name are left empty. Raises UsageError for anything else, and if there are more
    names than `images`.
    """
    value = _content(path, trust_pickle)
    if isinstance(value, dict):
        return _of_dictionary(path, value, images, source)

    if not isinstance(value, list):
        raise UsageError(
            f"--image-ids {path}: holds one {type(value).__name__}, expected a list of names or id"
            " -> row"
        )

    ids = [str(name) for name in value]
    if len(ids) > images:
        raise UsageError(
            f"--image-ids {path}: names {len(ids)} images, but the features hold {images}; give"
            " the file that belongs to them"
        )

    return RowNames([*ids, *[""] * (images - len(ids))])


def _content(path: str, trust_pickle: bool) -> Any:
    if Path(path).suffix in (".pkl", ".pickle"):
        if not trust_pickle:
            raise UsageError(
                f"--image-ids {path}: is a pickle; give --trust-pickle to read the numbers and"
                " strings in it"
            )

        try:
            with open(path, "rb") as handle:
                return loads(handle.read(MAX_PICKLE + 1))
        except UsageError:
            raise
        except (OSError, ValueError) as error:
            raise UsageError(f"--image-ids {path}: {error}") from error

    text = read_text(path, "--image-ids")
    if text.lstrip()[:1] not in ("{", "["):
        # a blank line in between is a row without a name
        return [line.strip() for line in text.rstrip().split("\n")]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--image-ids {path}: not valid JSON ({error})") from error


def _of_dictionary(path: str, value: dict[Any, Any], images: int, source: str) -> RowNames:
    names = RowNames([""] * images)
    numbers = re.findall(r"\d+", Path(source).stem)

    for name, row in value.items():
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        if isinstance(row, dict):
            if str(row.get("file", numbers[-1:] and numbers[-1])) not in numbers[-1:]:
                continue  # in another file of the set

            row = _add_facts(names, name, row)

        if not isinstance(row, int) or not 0 <= row < images:
            raise UsageError(f"--image-ids {path}: {name} is row {row}, expected 0 to {images - 1}")
        if names.ids[row]:
            raise UsageError(
                f"--image-ids {path}: {names.ids[row]} and {name} are both row {row}; give the"
                " file that belongs to the features"
            )

        names.ids[row] = name

    return names


def _add_facts(names: RowNames, name: str, facts: dict[str, Any]) -> Any:
    """Keep the number of regions and the size of an image; return its row."""
    fields, _ = renamed(facts)
    row = facts.get("idx")
    if isinstance(fields.get("num_boxes"), int) and isinstance(row, int):
        names.counts[row] = fields["num_boxes"]
    if "width" in fields and "height" in fields:
        names.sizes[name] = (fields["width"], fields["height"])

    return row
