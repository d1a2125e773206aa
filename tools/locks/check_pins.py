"""Compare the pins of requirements.txt with what others get from PyPI, and with one another.

    python tools/check_pins.py

torch is judged by the metadata of PyPI's wheels for Linux x86-64, the builds with CUDA, which need
more packages than a CPU build that may be installed here. The needs of the other pins, and
setup.py's ranges, are read from the packages installed here. Every pin must have files for each
Python and machine. No wheel is downloaded. Exit code 1 if there is a contradiction or the index
does not answer.
"""

import dataclasses
import functools
import importlib.metadata
import json
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from packaging.metadata import parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import UsageError

PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # those of launchers/make_environment.sh
MACHINES = ("x86_64", "aarch64")
GLIBC = 28  # glibc 2.28, that of torch's wheels
OURSELVES = "megatron_interbert"
TRIES = 3


class IndexFailure(Exception):
    """Represent an index that does not answer, or lacks what it must have."""


class Unreachable(IndexFailure):
    """Represent an index at whose address nothing answers."""


@dataclasses.dataclass(frozen=True)
class Pin:
    """Hold a pin `name==version` and its line in the requirements."""

    name: str
    version: Version
    line: int

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """Hold one file of a release: its address, its Pythons and its wheel tags (none: an sdist)."""

    url: str
    pythons: SpecifierSet
    tags: frozenset[Tag]

    def fits(self, python: str, machine: str) -> bool:
        """Check whether pip would take it for a Python and machine."""
        if not self.pythons.contains(f"{python}.0"):
            return False
        return not self.tags or not self.tags.isdisjoint(supported_tags(python, machine))


@functools.cache
def supported_tags(python: str, machine: str) -> frozenset[Tag]:
    """Return the wheel tags that CPython `python` accepts on Linux with glibc 2.28."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 4, -1)]
    platforms += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1")]
    version = tuple(int(part) for part in python.split("."))
    interpreter = "cp" + python.replace(".", "")

    return frozenset(
        [
            *cpython_tags(version, platforms=platforms),
            *compatible_tags(version, interpreter, platforms),
        ]
    )


def read_pins(path: Path) -> dict[str, Pin]:
    """Read {canonical name: pin} from requirements; raises UsageError for a line that is no pin."""
    pins = {}

    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        try:
            requirement = Requirement(text)
            (specifier,) = requirement.specifier
            version = Version(specifier.version)
        except (InvalidRequirement, InvalidVersion, ValueError):
            raise UsageError(f"{path}:{number}: {text!r} is no pin; write NAME==VERSION") from None

        if specifier.operator != "==" or requirement.marker or requirement.extras:
            raise UsageError(f"{path}:{number}: {text!r} is no pin; write NAME==VERSION")

        pins[canonicalize_name(requirement.name)] = Pin(requirement.name, version, number)

    return pins


def fetch(url: str, accept: str = "*/*") -> bytes:
    """Return the body at an address; raises IndexFailure if there is none after three tries."""
    request = urllib.request.Request(url, headers={"Accept": accept})

    for attempt in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == TRIES:
                raise IndexFailure(f"{url}: {error.code} {error.reason}") from None
        except OSError as error:
            if attempt == TRIES:
                raise Unreachable(f"{url}: {getattr(error, 'reason', error)}") from None

        time.sleep(attempt)

    raise AssertionError("not reached")


def release_files(index: str, pin: Pin) -> list[IndexFile]:
    """Return the files of a pinned release."""
    page = fetch(f"{index}/{canonicalize_name(pin.name)}/", "application/vnd.pypi.simple.v1+json")
    files = []

    for entry in json.loads(page)["files"]:
        name = entry["filename"]
        try:
            if name.endswith(".whl"):
                _, version, _, tags = parse_wheel_filename(name)
            else:
                _, version = parse_sdist_filename(name)
                tags = frozenset()
        except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
            continue  # old formats: eggs, installers

        if version == pin.version:
            pythons = SpecifierSet(entry.get("requires-python") or "")
            files.append(IndexFile(entry["url"], pythons, tags))

    return files


def missing_files(pin: Pin, files: list[IndexFile]) -> Iterator[str]:
    """Yield a complaint for each machine where a Python gets no file, or a source to compile."""
    if not files:
        yield f"{pin} (line {pin.line}): the index has no such release"
        return

    wheels = [file for file in files if file.tags]
    for machine in MACHINES:
        # A release without any wheel is plain Python, which pip builds itself.
        lacking = [
            python
            for python in PYTHONS
            if not any(file.fits(python, machine) for file in wheels or files)
        ]
        if lacking:
            pythons = ", ".join(lacking)
            yield f"{pin} (line {pin.line}): no wheel for Python {pythons} on Linux {machine}"


def needs_on_index(pin: Pin, files: list[IndexFile], python: str) -> list[Requirement]:
    """Return what the index's wheel for Linux x86-64 requires, by its metadata file (PEP 658)."""
    for file in files:
        if file.tags and file.fits(python, "x86_64"):
            metadata, _ = parse_email(fetch(file.url + ".metadata"))
            return [Requirement(text) for text in metadata.get("requires_dist", [])]

    return []


def needs_installed(name: str) -> list[Requirement]:
    """Return what an installed package requires, including its extras."""
    return [Requirement(text) for text in importlib.metadata.requires(name) or []]


def installed_version(name: str) -> Version | None:
    """Return the version installed here; None if there is none."""
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def applies(need: Requirement, python: str, extras: Iterable[str]) -> bool:
    """Check whether a need applies on Linux x86-64 with a Python, for any extra ("": none)."""
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    marker = need.marker

    return marker is None or any(
        marker.evaluate({**environment, "extra": extra}) for extra in extras
    )


def contradictions(
    pins: dict[str, Pin],
    owner: str,
    needs: dict[str, list[Requirement]],
    extras: Iterable[str] = ("",),
) -> list[str]:
    """Return a line for each pin outside what `owner` needs; `needs` is {Python: requirements}."""
    found: dict[tuple[Pin, str], list[str]] = defaultdict(list)

    for python, requirements in needs.items():
        for need in requirements:
            pin = pins.get(canonicalize_name(need.name))
            if pin is None or not applies(need, python, extras):
                continue
            if not need.specifier.contains(pin.version, prereleases=True):
                found[pin, f"{need.name}{need.specifier}"].append(python)

    return [
        f"{pin} (line {pin.line}): {owner} wants {wanted} on Python {', '.join(pythons)}"
        for (pin, wanted), pythons in found.items()
    ]


def check(path: Path, index: str) -> tuple[list[str], list[str]]:
    """Return (contradictions, what could not be judged) of the pins in a requirements file."""
    pins = read_pins(path)
    if "torch" not in pins:
        raise UsageError(f"{path}: torch is not pinned; add a line torch==VERSION")

    wrong = []
    unjudged = []

    for name, pin in pins.items():
        files = release_files(index, pin)
        wrong += missing_files(pin, files)

        if name == "torch":
            needs = {python: needs_on_index(pin, files, python) for python in PYTHONS}
            wrong += contradictions(pins, f"{pin} on {index}", needs)
        elif installed_version(name) == pin.version:
            wrong += contradictions(pins, str(pin), dict.fromkeys(PYTHONS, needs_installed(name)))
        else:
            unjudged.append(
                f"what {pin} needs (installed here: {installed_version(name) or 'none'})"
            )

    if installed_version(OURSELVES):
        extras = importlib.metadata.metadata(OURSELVES).get_all("Provides-Extra") or []
        needs = dict.fromkeys(PYTHONS, needs_installed(OURSELVES))
        wrong += contradictions(pins, "setup.py", needs, ["", *extras])
    else:
        unjudged.append("setup.py's ranges (the project is not installed here)")

    return wrong, unjudged


@dataclass
class Options(Flags):
    """Hold the flags of check_pins."""

    GROUP: ClassVar[str] = "data"

    requirements: Path = option(Path("requirements.txt"), "file of the pins", read=Path)
    index: str = option("https://pypi.org/simple", "package index (PEP 691)")


def run(options: Options) -> None:
    """Check the pins and print the contradictions, one line each."""
    if not options.requirements.is_file():
        raise UsageError(
            f"--requirements {options.requirements}: no such file; run this in the checkout"
        )

    index = options.index.rstrip("/")
    try:
        wrong, unjudged = check(options.requirements, index)
    except IndexFailure as error:
        print(f"pins not checked: {error}", file=sys.stderr)
        sys.exit(1)

    for line in wrong:
        print(f"{options.requirements}: {line}", file=sys.stderr)
    for line in unjudged:
        print(f"not judged: {line}", file=sys.stderr)
    if wrong:
        sys.exit(1)

    print(f"the pins agree with {index} and with one another on Python {', '.join(PYTHONS)}")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
