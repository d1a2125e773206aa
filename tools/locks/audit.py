"""Print the known advisories (CVEs, ..) of every version in requirements/*.lock.

    python tools/audit.py

They come from PyPI's JSON API, which names the versions that fix each. Versions that it does not
know are counted. Exit code 1 if there is an advisory, 0 if there is none or nothing can be reached.
"""

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from tools.locks import pypi
from tools.locks.check_pins import IndexFailure, Unreachable
from tools.locks.locked import FOLDER, Locked, read_locks

AT_A_TIME = 8


def ask(address: str, entry: Locked) -> list[dict[str, Any]] | IndexFailure:
    """Return the advisories of a locked version, except withdrawn ones, or why they are unknown."""
    try:
        page = pypi.release(address, entry.name, entry.version)
    except IndexFailure as failure:
        return failure

    advisories = page.get("vulnerabilities")
    if not isinstance(advisories, list):
        return IndexFailure(f"{address}/{entry.name}: the answer has no list of advisories")

    return [advisory for advisory in advisories if not advisory.get("withdrawn")]


def describe(entry: Locked, advisory: dict[str, Any]) -> str:
    """Describe an advisory in one line: package, its names, fixed versions and summary."""
    names = " ".join([advisory.get("id", "?"), *advisory.get("aliases", [])])
    mended = ", ".join(advisory.get("fixed_in", [])) or "no version yet"
    text = advisory.get("summary") or advisory.get("details") or ""
    return f"{entry}: {names}; fixed in {mended}; {' '.join(text.split())[:120]}"


def audit(address: str, locked: Iterable[Locked]) -> tuple[list[str], list[str]]:
    """Return (a line for each advisory, a reason for each version that could not be looked up)."""
    entries = list(locked)
    answers = [ask(address, entry) for entry in entries[:1]]
    # If nothing answers, each further request would wait for a time-out.
    if answers and isinstance(answers[0], Unreachable):
        return [], [str(answers[0])] * len(entries)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        answers += pool.map(lambda entry: ask(address, entry), entries[1:])

    found = []
    unknown = []

    for entry, answer in zip(entries, answers, strict=True):
        if isinstance(answer, IndexFailure):
            unknown.append(str(answer))
        else:
            found += [describe(entry, advisory) for advisory in answer]

    return found, unknown


@dataclass
class Options(Flags):
    """Hold the flags of audit."""

    GROUP: ClassVar[str] = "data"

    locks: Path = option(FOLDER, "folder of the locks", read=Path)
    api: str = option(pypi.ADDRESS, "address of a JSON API like PyPI's")


def run(options: Options) -> None:
    """Audit the locks and print what was found, one line each."""
    locked = read_locks(options.locks)
    found, unknown = audit(options.api.rstrip("/"), locked)
    for line in found:
        print(line)

    known = len(locked) - len(unknown)
    count = f"{len(found)} advisories for {known} of {len(locked)} locked versions"

    if not known:
        print(f"not audited: advisories cannot be reached ({unknown[0]})")
    elif unknown:
        print(f"{count}; {len(unknown)} were not looked up (the first: {unknown[0]})")
    else:
        print(count)

    if found:
        sys.exit(1)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
