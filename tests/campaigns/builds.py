"""Kills builds of region stores at random moments, starts them again, and compares the result with
an undisturbed one.

    python -m tests.campaigns.builds --kills 50

Each build is the real command with two processes. It is killed as a whole or only its first process
(the others must then end by themselves), until one life comes through; then all bytes of the store
must be those of the undisturbed build.
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.corpus import VOCABULARY
from tests.launching import start
from tests.preparation.formats import lxmert_line, made_up_images, tensorpack_lmdb, write_npz

IMAGES = 400


def commands(folder: Path) -> dict[str, tuple]:
    """Flags of builds from three formats, with captions, a vocabulary and images that come
    twice.
    """
    images = made_up_images(IMAGES, features=512)
    (folder / "x.tsv").write_text("".join(map(lxmert_line, images + images[:40])))
    names = [str(image["image_id"]) for image in images]
    (folder / "captions.tsv").write_text(
        "".join(f"{name}\ta red cat near {name}\n" for name in names[10:])
    )
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    write_npz(folder / "npz", images)
    tensorpack_lmdb(folder / "x.lmdb", images, [f"the old dog {name}" for name in names])
    more = ("--vocab-file", folder / "vocab.txt", "--workers", 2, "--images-per-shard", 20)
    captions = ("--captions", folder / "captions.tsv")

    return {
        "tsv": (folder / "x.tsv", *captions, *more),
        "npz": (folder / "npz", *captions, *more),
        "lmdb": (folder / "x.lmdb", *more),
    }


def content(store: Path) -> dict[str, str]:
    """Hashes of all files."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.iterdir())
    }


def live(flags: tuple, output: Path, after: float | None, whole: bool, counts: Counter) -> bool:
    """One life of a build; killed after some seconds, or not. True when it came through."""
    process = start(sys.executable, "tools/build_features.py", *flags, "--output", output)

    if after is not None:
        deadline = time.monotonic() + after
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            done = len(list(output.with_name(output.name + ".partial").glob("shard-*.json")))
            counts[
                (
                    "before the first shard"
                    if not done
                    else "between shards"
                    if done < IMAGES // 20
                    else "while finishing"
                )
            ] += 1
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)

    _, err = process.communicate(timeout=120)
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"a build failed after a kill: {err}")

    return process.returncode == 0


def campaign(kills: int, seed: int) -> Counter:
    """Builds until so many lives have been ended; where they were."""
    chance = random.Random(seed)
    counts = Counter()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builds = commands(folder)
        expected = {}
        seconds = {}

        for kind, flags in builds.items():
            began = time.monotonic()
            live(flags, folder / f"expected-{kind}", None, True, counts)
            seconds[kind] = time.monotonic() - began
            expected[kind] = content(folder / f"expected-{kind}")

        number = 0
        while sum(counts.values()) - counts["builds compared"] < kills:
            kind = chance.choice(sorted(builds))
            output = folder / f"build-{number}"

            for _ in range(chance.randrange(1, 6)):
                live(
                    builds[kind],
                    output,
                    chance.uniform(0.2, 1.1) * seconds[kind],
                    chance.random() < 0.5,
                    counts,
                )
                if output.exists():  # it came through, or was killed when all was done
                    break

            if not output.exists():
                live(builds[kind], output, None, True, counts)
            if content(output) != expected[kind]:
                raise AssertionError(f"build {number} of {kind} differs from the undisturbed one")

            counts["builds compared"] += 1
            number += 1

    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    counts = campaign(options.kills, options.seed)
    print(
        "; ".join(f"{name}: {count}" for name, count in counts.items()),
        f"; {time.monotonic() - began:.0f} s",
        sep="",
    )


if __name__ == "__main__":
    main()
