"""Mutated pickles: each gives a value or a ValueError, in bounded memory; the helper survives.

python -m tests.campaigns.pickles --cases 200000 --seed 1
"""

import argparse
import pickle
import random
import resource
import time
from collections import Counter

import numpy as np

from megatron_interbert.preparation.building.pickles.nodes import UnsafePickle
from megatron_interbert.preparation.building.pickles.reading import _process, loads
from tests.preparation.crafted import python_2, with_pointers

MEGABYTES = 300  # that the reader may grow by
PIECES = (
    b"(t",
    b"]q\x00",
    b"h\x00",
    b"R",
    b"b",
    b"2",
    b"0",
    b"I999999999999\n",
    b"J\xff\xff\xff\x7f",
    b"V8",
    b"O8",
    b"cos\nsystem\n",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"cnumpy\ndtype\n",
)


def honest_pickles() -> list[bytes]:
    """Make rows and arrays in every protocol, and crafted ones, to reach every corner."""
    random_numbers = np.random.default_rng(0)
    features = random_numbers.normal(size=(4, 8)).astype(np.float32)
    row = {
        "image_id": "image-1",
        "image_h": 80,
        "image_w": np.int64(100),
        "features": features,
        "boxes": np.asfortranarray(features[:, :4]),
        "objects": np.array([{"a": (1, 2.5, None)}, "text"], dtype=object),
        "data": b"AAAA" * 10,
        "shared": [[1, 2]] * 3,
    }
    pickles = [python_2(features, protocol) for protocol in (0, 1, 2)]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickles.append(pickle.dumps(row, protocol))
        pickles.append(pickle.dumps(features.T, protocol))

    for value in with_pointers().values():
        pickles.append(pickle.dumps(value, 2))
        pickles.append(pickle.dumps(value, 5))

    return pickles


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Flip, cut, splice, double, or swap opcodes, once or several times."""
    result = bytearray(data)

    for _ in range(chance.choice((1, 1, 1, 2, 4, 10))):
        place = chance.randrange(len(result) + 1)
        length = chance.choice((1, 2, 8, 40))
        kind = chance.randrange(7)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << chance.randrange(8)

        elif kind == 1 and place < len(result):
            result[place] = chance.choice(OPCODES)

        elif kind == 2:
            del result[place : place + length]

        elif kind == 3:
            result[place:place] = result[place : place + length]

        elif kind == 4:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            result[place:place] = other[start : start + length]

        elif kind == 5:
            result[place:place] = chance.choice(PIECES)

        elif chance.random() < 0.2:
            del result[place:]

    return bytes(result)


OPCODES = [
    value[0]
    for name, value in vars(pickle).items()
    if name.isupper() and isinstance(value, bytes) and len(value) == 1
]


def campaign(cases: int, seed: int) -> Counter[str]:
    """Read `cases` mutated pickles; how many gave a value, were damaged, or were unsafe.

    AssertionError when the helper has died, or this process has grown.
    """
    originals = honest_pickles()
    loads(originals[0])
    helper = _process.process.pid
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    counts: Counter[str] = Counter()
    for number in range(cases):
        chance = random.Random(seed * 1_000_003 + number)
        data = mutate(chance.choice(originals), originals, chance)
        counts[outcome(data)] += 1
        assert _process.process.pid == helper, f"case {number} of seed {seed} has ended the helper"

    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < MEGABYTES, f"grown by {grown} MiB"

    return counts


def outcome(data: bytes) -> str:
    """Read one pickle and use what comes of it; how it ended."""
    try:
        repr(loads(data))
        return "value"

    except UnsafePickle:
        return "unsafe"

    except ValueError:
        return "damaged"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    start = time.monotonic()
    counts = campaign(options.cases, options.seed)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")

    print(f"{options.cases} mutated pickles in {time.monotonic() - start:.0f} s: no crash, no hang")


if __name__ == "__main__":
    main()
