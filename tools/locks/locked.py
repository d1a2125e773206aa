"""Read requirements/*.lock: every installed package, direct or not, with the hashes of its files.

common.lock holds what all builds of torch share, cuda.lock PyPI's torch and what only that needs.
tools/lock.py writes them; pip reads them with --require-hashes.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_interbert.errors import UsageError
from tools.locks.check_pins import MACHINES, PYTHONS

FOLDER = Path("requirements")
COMMON = "common.lock"
CUDA = "cuda.lock"
HASH = re.compile(r"sha256:[0-9a-f]{64}")
MEND = "regenerate the locks: python tools/lock.py"


@dataclasses.dataclass(frozen=True)
class Locked:
    """Hold one version in a lock: its place, the marker of its machines, its files' hashes."""

    name: str
    version: Version
    marker: Marker | None
    hashes: tuple[str, ...]
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.name}=={self.version} ({self.path}:{self.line})"

    def applies(self, python: str, machine: str) -> bool:
        """Check whether pip installs it for a Python and machine."""
        return self.marker is None or self.marker.evaluate(linux(python, machine))


def linux(python: str, machine: str) -> dict[str, str]:
    """Return the environment for markers on Linux with CPython `python`."""
    return {
        "extra": "",
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def places() -> Iterator[tuple[str, str]]:
    """Yield each (Python, machine) that the locks are for."""
    for python in PYTHONS:
        for machine in MACHINES:
            yield python, machine


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of its first line, text) of each logical line, without comments, with continued
    lines joined.
    """
    parts: list[str] = []
    first = 0

    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        first = first if parts else number
        parts.append(line.removesuffix("\\").strip())
        if line.endswith("\\"):
            continue
        if joined := " ".join(parts).strip():
            yield first, joined

        parts = []

    if joined := " ".join(parts).strip():
        yield first, joined


def read_lock(path: Path) -> list[Locked]:
    """Read the versions of one lock; raises UsageError for a line that locks nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; run this in the checkout, or {MEND}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text; {MEND}") from None

    locked = []
    for line, content in logical_lines(text):
        if content == f"-r {COMMON}" and path.name == CUDA:
            continue

        head, *hashes = content.split(" --hash=")
        try:
            requirement = Requirement(head)
            (specifier,) = requirement.specifier
            version = Version(specifier.version)
        except (InvalidRequirement, ValueError):
            raise UsageError(f"{path}:{line}: {head[:80]!r} is not NAME==VERSION; {MEND}") from None

        if specifier.operator != "==":
            raise UsageError(f"{path}:{line}: {head[:80]!r} is not NAME==VERSION; {MEND}")

        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        locked.append(Locked(name, version, marker, tuple(hashes), path, line))

    return locked


def read_locks(folder: Path) -> list[Locked]:
    """Read the versions of both locks of a folder."""
    return read_lock(folder / COMMON) + read_lock(folder / CUDA)
