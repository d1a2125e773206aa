#!/usr/bin/env python3
"""Requests that no client should send, by the thousand: bytes, JSON, headers and paths, mutated and
made up.

    python -m tests.campaigns.requests --url http://127.0.0.1:8080 --count 10000 [--key KEY]

Every one must be answered within seconds, never with a 5xx but the 503 of a deadline; and
afterwards the service must be as before.
"""

import argparse
import http.client
import json
import random
import sys
import time
from collections import Counter
from urllib.parse import quote, urlsplit

from megatron_interbert.progress import progress

SEEDS = {
    "/search": {"query": "红色条纹连衣裙", "k": 3, "candidates": 10},
    "/recommend": {
        "topic": {"name": "清爽海滩系列", "description": "蓝色", "keywords": ["泳衣"]},
        "k": 3,
        "candidates": 10,
    },
    "/score": {"text": "红色", "item_ids": ["test-000001"], "explain": True},
}
STRINGS = (
    "",
    " ",
    "\0",
    "\ud800",
    "a" * 300,
    "长" * 300,
    "../../etc/passwd",
    "<script>",
    "' OR 1=1 --",
    "{{7*7}}",
    "\u202e",
    "😀" * 50,
    "%s%n",
)
NUMBERS = (0, -1, 1e400, -1e400, 2**63, 10**40, 0.5, True, None, float("nan"))
PATHS = (
    "/search",
    "/recommend",
    "/score",
    "/topics",
    "/items/",
    "/pictures/",
    "/page/",
    "/readyz",
    "/metrics",
    "/",
    "/openapi.json",
)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
HANGS = 30.0  # seconds


def value(random_: random.Random, depth: int = 0):
    """Any JSON value."""
    kind = random_.randrange(5 if depth < 4 else 3)
    if kind == 0:
        return random_.choice(STRINGS)
    if kind in (1, 2):
        return random_.choice(NUMBERS)
    if kind == 3:
        return [value(random_, depth + 1) for _ in range(random_.randrange(6))]

    return {
        random_.choice([*STRINGS, "query", "k", "topic", "item_ids"]): value(random_, depth + 1)
        for _ in range(random_.randrange(5))
    }


def mutated(random_: random.Random, body):
    """A good body with something wrong in it."""
    if not isinstance(body, dict) or not body or random_.random() < 0.1:
        return value(random_)

    found = dict(body)
    for _ in range(random_.randrange(1, 3)):
        key = random_.choice([*found, "extra"])
        action = random_.randrange(4)
        if action == 0:
            found.pop(key, None)
        elif action == 1 and isinstance(found.get(key), dict):
            found[key] = mutated(random_, found[key])
        else:
            found[key] = value(random_)

    return found


def request(random_: random.Random, key: str) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers)."""
    path = random_.choice(list(SEEDS)) if random_.random() < 0.6 else random_.choice(PATHS)
    if path.endswith("/") and len(path) > 1:
        path += quote(
            random_.choice([s for s in STRINGS if "\ud800" not in s])
            + random_.choice(("", "test-000001")),
            safe="/",
        )[:2000]

    method = "POST" if path in SEEDS and random_.random() < 0.8 else random_.choice(METHODS)
    text = json.dumps(
        mutated(random_, SEEDS.get(path, {"image_id": "test-000001", "title": "x"})),
        ensure_ascii=random_.random() < 0.5,
    )
    body = text.encode("utf-8", "surrogatepass")
    damage = random_.randrange(8)

    if damage == 0 and body:
        body = bytes(b if random_.random() > 0.05 else random_.randrange(256) for b in body)
    elif damage == 1:
        body = body[: random_.randrange(len(body) + 1)]
    elif damage == 2:
        body = random_.randbytes(random_.randrange(200))
    elif damage == 3 and random_.random() < 0.1:
        body = b'{"query": "' + b"x" * random_.choice((60_000, 70_000, 500_000)) + b'"}'

    headers = {
        "content-type": random_.choice(
            ("application/json", "application/json", "text/plain", "multipart/form-data", "x" * 100)
        )
    }
    if random_.random() < 0.3:
        headers["authorization"] = random_.choice(
            (f"Bearer {key}", "Bearer ", "Bearer " + "x" * 2000, "Basic eDp4", "Bearer \xff")
        )

    return method, path, body, headers


def send(host: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of the answer; 0 where the connection was closed instead (a body that is refused
    before it was read).
    """
    connection = http.client.HTTPConnection(host, timeout=HANGS)

    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (ConnectionError, http.client.RemoteDisconnected):
        return 0
    finally:
        connection.close()


def campaign(url: str, count: int, seed: int, key: str) -> Counter:
    """Statuses of `count` requests.

    AssertionError for the first that is answered as none should be.
    """
    host = urlsplit(url).netloc
    found = Counter()
    random_ = random.Random(seed)

    for number in progress(range(count), unit="request", desc="requests"):
        asked = request(random_, key)
        started = time.monotonic()
        status = send(host, *asked)
        assert status < 500 or status == 503, (number, status, asked)
        assert time.monotonic() - started < HANGS, (number, asked)
        found[status] += 1

    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", default="")
    arguments = parser.parse_args()
    print(
        dict(
            sorted(campaign(arguments.url, arguments.count, arguments.seed, arguments.key).items())
        )
    )


if __name__ == "__main__":
    sys.exit(main())
