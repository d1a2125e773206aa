#!/usr/bin/env python3
"""Print the known advisories (CVEs, ..) of every version in requirements/*.lock.

    python tools/audit.py

They are those of PyPI's JSON API, which names the versions that mend each. Versions that it does not
know are counted. Exit code 1 if there is an advisory, 0 if there is none or nothing can be reached.
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import run_entry
from megatron_interbert.parser import Parser
from tools import pypi
from tools.check_pins import IndexFailure, Unreachable
from tools.locks import FOLDER, Locked, read_locks

AT_A_TIME = 8


def ask(address: str, entry: Locked) -> list[dict[str, Any]] | IndexFailure:
    """The advisories of a locked version that were not withdrawn, or why they are not known."""
    try:
        page = pypi.release(address, entry.name, entry.version)
    except IndexFailure as failure:
        return failure
    advisories = page.get("vulnerabilities")
    if not isinstance(advisories, list):
        return IndexFailure(f"{address}/{entry.name}: the answer has no list of advisories")
    return [advisory for advisory in advisories if not advisory.get("withdrawn")]


def describe(entry: Locked, advisory: dict[str, Any]) -> str:
    """One line: package, names of the advisory, what mends it, what it is about."""
    names = " ".join([advisory.get("id", "?"), *advisory.get("aliases", [])])
    mended = ", ".join(advisory.get("fixed_in", [])) or "no version yet"
    text = advisory.get("summary") or advisory.get("details") or ""
    return f"{entry}: {names}; mended in {mended}; {' '.join(text.split())[:120]}"


def audit(address: str, locked: Iterable[Locked]) -> tuple[list[str], list[str]]:
    """(a line for each advisory, why a version could not be looked up for each such)."""
    entries = list(locked)
    answers = [ask(address, entry) for entry in entries[:1]]
    # Where nothing answers, each more would wait for a time-out.
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


def run() -> None:
    """Audit and say what was found, one line each."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--locks", type=Path, default=FOLDER, help="folder of the locks")
    parser.add_argument("--api", default=pypi.ADDRESS, help="address of a JSON API like PyPI's")
    options = parser.parse_args()

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


if __name__ == "__main__":
    run_entry(run)
