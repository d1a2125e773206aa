"""Ask PyPI's JSON API about a release: its licence, and the advisories that name it."""

import json
from typing import Any

from packaging.version import Version

from tools.locks.check_pins import IndexFailure, fetch

ADDRESS = "https://pypi.org/pypi"


def release(address: str, name: str, version: Version) -> dict[str, Any]:
    """Return the JSON page of a release; raises IndexFailure if there is none.

    A mirror may have only the page of the newest release, which is used if it is the right one.
    """
    try:
        return read(f"{address}/{name}/{version}/json")
    except IndexFailure as failure:
        if ": 404 " not in str(failure):
            raise
        page = read(f"{address}/{name}/json")
        if Version(page["info"]["version"]) != version:
            raise failure from None
        return page


def read(url: str) -> dict[str, Any]:
    """Read the JSON page of a release; raises IndexFailure if the answer is something else."""
    try:
        page = json.loads(fetch(url))
    except ValueError:
        raise IndexFailure(f"{url}: the answer is not JSON") from None

    if not isinstance(page, dict) or "version" not in page.get("info", {}):
        raise IndexFailure(f"{url}: the answer does not describe a release")

    return page
