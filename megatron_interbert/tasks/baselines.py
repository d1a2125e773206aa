"""Keep what can be reached on generated files without reading text and image together, and show it
beside results on those files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.files import file_sha256
from megatron_interbert.reading import is_there, read_json_value

FILE = "baselines.json"  # in the folder of the files, or the one above
FORMAT = "interbert baselines"

Figures = Mapping[str, Mapping[str, float]]  # figures by the name of a baseline


def document_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of FILE."""
    return {"format": FORMAT, "entries": list(entries)}


def entry_of(files: Sequence[str | Path], samples: int, figures: Figures) -> dict[str, Any]:
    """Return the entry for FILE of so many samples of some files: the figures of each baseline."""
    hashes = [file_sha256(file) for file in files]
    return {"files": hashes, "samples": samples, "figures": dict(figures)}


def baselines_of(files: Sequence[str | Path], samples: int) -> list[dict[str, Any]]:
    """Return the baselines that are known for so many samples of some files, as `results.table`
    shows them; none if there is no FILE near the first of them, or if it is about others.
    """
    folders = [parent for file in files[:1] for parent in list(Path(file).resolve().parents)[:2]]
    found = next((place / FILE for place in folders if is_there(place / FILE)), None)
    document = read_json_value(found, FILE) if found else {}
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return []  # a file of somebody else

    hashes = {file_sha256(file) for file in files}
    figures = next(
        (
            entry["figures"]
            for entry in document["entries"]
            if hashes.issuperset(entry["files"]) and entry["samples"] == samples
        ),
        {},
    )

    return [
        {"model": name, "part": "", "source": f"a baseline of {found}", "figures": values}
        for name, values in figures.items()
    ]
