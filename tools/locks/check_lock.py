"""Compare requirements/*.lock with requirements.txt and with the packages installed here.

    python tools/check_lock.py

Every pin must be locked in its version for each Python and machine, every locked version must have
hashes, and every installed package must be the locked one. Otherwise the exit code is 1. Does not
use the network.
"""

import importlib.metadata
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import UsageError
from tools.locks.check_pins import MACHINES, OURSELVES, PYTHONS, Pin, read_pins
from tools.locks.locked import FOLDER, HASH, MEND, Locked, places, read_locks

THIS_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
NOT_OURS = {"pip", canonicalize_name(OURSELVES)}  # part of Python, and the checkout


def locked_there(locked: Iterable[Locked], python: str, machine: str) -> dict[str, list[Locked]]:
    """Return {name: its locked versions} for a Python and machine."""
    found = defaultdict(list)
    for entry in locked:
        if entry.applies(python, machine):
            found[entry.name].append(entry)

    return found


def wrong_hashes(locked: Iterable[Locked]) -> Iterator[str]:
    """Yield a complaint for each version without a hash, and for each hash that is not a sha256."""
    for entry in locked:
        if not entry.hashes:
            yield f"{entry} has no hash"
        for value in entry.hashes:
            if not HASH.fullmatch(value):
                yield f"{entry}: {value[:80]!r} is not a sha256 hash"


def twice(locked: Iterable[Locked]) -> Iterator[str]:
    """Yield a complaint for each name that is locked twice for one Python and machine."""
    told = set()

    for python, machine in places():
        for name, entries in locked_there(locked, python, machine).items():
            if len(entries) > 1 and name not in told:
                told.add(name)
                both = " and ".join(str(entry) for entry in entries)
                yield f"{both} are both for Python {python} on {machine}"


def unlocked_pins(pins: dict[str, Pin], locked: Iterable[Locked]) -> Iterator[str]:
    """Yield a complaint for each pin that is locked in another version, or not at all, for some
    Python and machine.
    """
    told = set()

    for python, machine in places():
        there = locked_there(locked, python, machine)
        for name, pin in pins.items():
            entries = there.get(name, [])
            if name in told or any(entry.version == pin.version for entry in entries):
                continue
            told.add(name)
            found = " and ".join(str(entry) for entry in entries) or "nothing of that name"
            yield f"{pin} (line {pin.line} of requirements.txt): locked is {found}"


def installed() -> dict[str, str]:
    """Return {canonical name: version} of all packages here except pip and the checkout."""
    found = {}

    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name and name not in NOT_OURS:
            # The first one in sys.path is the one that is imported.
            found.setdefault(name, distribution.version)

    return found


def wrongly_installed(
    packages: dict[str, str], locked: Iterable[Locked], machine: str
) -> Iterator[str]:
    """Yield a complaint for each installed package that is not the locked one."""
    there = locked_there(locked, THIS_PYTHON, machine)

    for name, text in sorted(packages.items()):
        try:
            version = Version(text)
        except InvalidVersion:
            yield f"{name} {text} is installed: not a version"
            continue

        # A build of torch such as 2.13.0+cpu counts as torch 2.13.0.
        if name == "torch":
            version = Version(version.public)

        entries = there.get(name, [])
        if any(entry.version == version for entry in entries):
            continue

        found = " and ".join(str(entry) for entry in entries) or "nothing of that name"
        yield f"{name}=={text} is installed here; locked is {found}"


def check(requirements: Path, folder: Path, packages: dict[str, str]) -> list[str]:
    """Return all contradictions, a line each."""
    pins = read_pins(requirements)
    locked = read_locks(folder)
    machine = platform.machine()

    return [
        *unlocked_pins(pins, locked),
        *wrong_hashes(locked),
        *twice(locked),
        *wrongly_installed(packages, locked, machine),
    ]


@dataclass
class Options(Flags):
    """Hold the flags of check_lock."""

    GROUP: ClassVar[str] = "data"

    requirements: Path = option(Path("requirements.txt"), "file of the pins", read=Path)
    locks: Path = option(FOLDER, "folder of the locks", read=Path)


def run(options: Options) -> None:
    """Check the locks and print the contradictions, one line each."""
    if not options.requirements.is_file():
        raise UsageError(
            f"--requirements {options.requirements}: no such file; run this in the checkout"
        )

    packages = installed()
    wrong = check(options.requirements, options.locks, packages)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} contradictions; {MEND}, or the environment", file=sys.stderr)
        sys.exit(1)

    print(
        f"the locks agree with {options.requirements} and with the {len(packages)} packages"
        f" installed here, for Python {', '.join(PYTHONS)} on {', '.join(MACHINES)}"
    )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
