"""List the licence of everything in requirements/*.lock, and check the list.

    python tools/licences.py            # writes docs/licences.md, from the packages' own metadata
    python tools/licences.py --check    # no network; exit code 1 if stale or not allowed

A licence is read from the metadata: License-Expression, else a short License, else classifiers.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from packaging.metadata import parse_email

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from tools.locks import pypi
from tools.locks.check_pins import (
    PYTHONS,
    IndexFailure,
    Pin,
    fetch,
    installed_version,
    release_files,
)
from tools.locks.locked import CUDA, FOLDER, Locked, read_locks

LIST = Path("docs/licences.md")
INDEX = "https://pypi.org/simple"
MEND = "python tools/licences.py writes the list again"
AT_A_TIME = 8
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "LLVM-exception",
    "LicenseRef-NVIDIA-Proprietary",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "OLDAP-2.8",
    "PSF-2.0",
    "Zlib",
}
UNSTATED = {"cuda-toolkit"}  # has no files of its own, only requires NVIDIA's packages
# Names in older metadata -> SPDX. "BSD" alone leaves open how many clauses it has.
CALLED = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "Python Software Foundation License": "PSF-2.0",
}
NONE = "none stated"
HEAD = """\
# Licences of what is installed

Made from the packages' own metadata by `python tools/licences.py`, not by hand. Nothing of it is
part of this project (Apache-2.0): pip fetches it. `cuda` comes with PyPI's torch only; most of it
is NVIDIA's and proprietary. `BSD` stands where a package does not say which, `none stated` where it
says nothing.

| package | version | with | licence |
|---|---|---|---|
"""
ROW = re.compile(r"\| (\S+) \| (\S+) \| (all|cuda) \| (.+) \|")


def licence_of(metadata: dict[str, Any]) -> str:
    """Return the licence in metadata (with the keys of `packaging.metadata`), as SPDX if known."""
    expression = metadata.get("license_expression")
    if expression:
        return expression

    classifiers = [
        text.split(" :: ")[-1]
        for text in metadata.get("classifiers", [])
        if text.startswith("License :: OSI Approved :: ")
    ]
    text = (metadata.get("license") or "").strip()
    if not text or "\n" in text or len(text) > 80:
        return " AND ".join(CALLED.get(name, name) for name in classifiers) or NONE

    return CALLED.get(text, text)


def metadata_of(entry: Locked) -> dict[str, Any]:
    """Return the metadata of a release, of the one installed here or else from the index.

    Raises IndexFailure if the index lacks it.
    """
    if installed_version(entry.name) == entry.version:
        return parse_email(importlib.metadata.distribution(entry.name).read_text("METADATA"))[0]

    files = release_files(INDEX, Pin(entry.name, entry.version, entry.line))
    wheels = [file for file in files if file.tags and file.fits(PYTHONS[1], "x86_64")]
    if wheels:
        try:
            return parse_email(fetch(wheels[0].url + ".metadata"))[0]
        except IndexFailure:
            pass  # an index need not serve the metadata file

    return pypi.release(pypi.ADDRESS, entry.name, entry.version)["info"]


def refused(licence: str) -> list[str]:
    """Return the parts of a licence expression that are not allowed."""
    parts = re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", licence)
    return [part.strip() for part in parts if part.strip() and part.strip() not in ALLOWED]


def rows(locked: list[Locked]) -> Iterator[str]:
    """Yield the rows of the table, one for each locked version; raises IndexFailure if metadata
    cannot be read.
    """
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = list(pool.map(metadata_of, locked))
    for entry, metadata in zip(locked, found, strict=True):
        comes_with = "cuda" if entry.path.name == CUDA else "all"
        yield f"| {entry.name} | {entry.version} | {comes_with} | {licence_of(metadata)} |"


def read_list(path: Path) -> dict[tuple[str, str, str], str]:
    """Read {(package, version, with): licence} from the list; raises UsageError for a bad row."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; {MEND}")

    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|") or line.startswith(("| package |", "|---")):
            continue

        row = ROW.fullmatch(line)
        if row is None:
            raise UsageError(f"{path}:{number}: {line[:80]!r} is not a row of the list; {MEND}")

        name, version, comes_with, licence = row.groups()
        found[name, version, comes_with] = licence

    return found


def check(path: Path, locked: list[Locked]) -> list[str]:
    """Return what is stale or not allowed, a line each."""
    listed = read_list(path)
    wanted = {
        (entry.name, str(entry.version), "cuda" if entry.path.name == CUDA else "all"): entry
        for entry in locked
    }
    wrong = [f"{entry} is not listed" for key, entry in wanted.items() if key not in listed]
    wrong += [
        f"{name} {version} is listed, not locked" for name, version, _ in listed.keys() - wanted
    ]

    for (name, version, _), licence in listed.items():
        parts = refused(licence)
        if parts and not (licence == NONE and name in UNSTATED):
            wrong.append(f"{name} {version}: a licence not allowed here: {' and '.join(parts)}")

    for key, entry in wanted.items():
        if key in listed and installed_version(entry.name) == entry.version:
            said = licence_of(metadata_of(entry))
            if said != listed[key]:
                wrong.append(
                    f"{entry}: {listed[key]} is listed, the package installed here says {said}"
                )

    return wrong


@dataclass
class Options(Flags):
    """Hold the flags of licences."""

    GROUP: ClassVar[str] = "data"

    locks: Path = option(FOLDER, "folder of the locks", read=Path)
    list: Path = option(LIST, "file of the list of licences", read=Path)
    check_only: bool = option(False, "check the list and write nothing", flag="--check")


def run(options: Options) -> None:
    """Write or check the list."""
    locked = read_locks(options.locks)

    if not options.check_only:
        try:
            text = HEAD + "\n".join(rows(locked)) + "\n"
        except IndexFailure as failure:
            raise UsageError(f"{options.list} is not written: {failure}") from None

        write_text(options.list, text)

    wrong = check(options.list, locked)
    for line in wrong:
        print(f"{options.list}: {line}", file=sys.stderr)
    if wrong:
        print(
            f"{MEND}; to allow a licence, add it to ALLOWED in tools/locks/licences.py",
            file=sys.stderr,
        )
        sys.exit(1)

    print(f"{options.list}: the licences of {len(locked)} locked versions are allowed")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
