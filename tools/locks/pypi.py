"""What PyPI's JSON API says of a release: its licence, and the advisories that name it."""

import json
from typing import Any

from packaging.version import Version

from tools.locks.check_pins import IndexFailure, fetch

ADDRESS = "https://pypi.org/pypi"


def release(address: str, name: str, version: Version) -> dict[str, Any]:
    """Give the JSON page of a release; IndexFailure if there is none.

    A mirror may have none but the page of the newest release: it serves where that is the one.
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
    """Read a JSON object; IndexFailure if the answer is something else."""
    try:
        page = json.loads(fetch(url))
    except ValueError:
        raise IndexFailure(f"{url}: the answer is no JSON") from None

    if not isinstance(page, dict) or "version" not in page.get("info", {}):
        raise IndexFailure(f"{url}: the answer describes no release")

    return page
