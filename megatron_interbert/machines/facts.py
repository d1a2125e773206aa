"""Identify the code and the libraries of a machine, on which results depend."""

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import megatron_interbert


@cache
def code_fingerprint() -> str:
    """Return the first 12 hex digits of a hash over the Python files of this package.

    Unlike a git revision it shows uncommitted changes.
    """
    digest = hashlib.sha256()
    root = Path(megatron_interbert.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())

    return digest.hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries on which results depend, by name."""
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name)
        for name in ("torch", "deepspeed", "numpy", "tokenizers")
    }
