"""Read the paths of region stores from flags that name one or several."""

import os
from typing import Any

from megatron_interbert.config.options import rows


def paths_of_stores(config: Any) -> list[str]:
    """Return the paths of all region stores that a configuration names."""
    given = (getattr(config, name) for name, facts in rows(config) if facts.names_store)
    return [path for text in given for path in split_paths(text)]


def split_paths(text: str) -> list[str]:
    """Split `a, b` into [a, b]; keep the text whole if it names a folder itself."""
    if "," in text and os.path.isdir(text):
        return [text]
    return [path.strip() for path in text.split(",") if path.strip()]
