"""HDF5 files with hostile features and flipped bytes: each is read or refused in one line, within
memory and time, and nothing outside of it comes out.

python -m tests.campaigns.hostile_hdf5 --cases 500 --seed 1
"""

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import h5py

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from tests.corpus import write_store
from tests.launching import ENVIRONMENT, ROOT
from tests.preparation.formats import adaptive_hdf5, made_up_images
from tests.preparation.hostile import HOSTILE, renew

SECRET = b"secret of another folder; " * 300
BATCH = 50  # cases that one process reads
SECONDS = 10  # that one case may take
MEMORY = 1 << 30  # bytes that a process may take beyond what it has when it begins
STRUCTURES = (b"TREE", b"HEAP", b"SNOD", b"GCOL", b"\x89HDF")


def prepare(folder: Path) -> None:
    """Good files of every kind, and the secret beside them."""
    write_store(folder / "good-store", images=12)
    names = adaptive_hdf5(folder / "good.hdf5", made_up_images(3))
    with h5py.File(folder / "good.hdf5", "r+") as file:
        file["image_ids"] = names
    with h5py.File(folder / "good.hdf5") as plain, h5py.File(folder / "packed.hdf5", "w") as packed:
        for name in plain:
            values = plain[name][:].tolist()
            texts = name == "image_ids"  # HDF5 keeps no checksums of these
            packed.create_dataset(
                name,
                data=values,
                dtype=plain[name].dtype,
                chunks=True,
                compression="gzip",
                fletcher32=not texts,
            )

    (folder / "secret").write_bytes(SECRET)


def make_case(good: Path, place: Path, chance: random.Random) -> Path:
    """A hostile store or source at a place."""
    if chance.random() < 0.6:
        shutil.copytree(good / "good-store", place)
        file = place / chance.choice(("captions.h5", "tokens.h5", "shard-00000.h5"))
        spoil(file, good / "secret", chance)
        renew(place)
        return place

    place.mkdir()
    file = shutil.copy(good / chance.choice(("good.hdf5", "packed.hdf5")), place / "features.hdf5")
    spoil(file, good / "secret", chance)

    return file


def spoil(path: Path, secret: Path, chance: random.Random) -> None:
    """Add features that reach out to some datasets, flip bytes, or both."""
    if chance.random() < 0.6:
        with h5py.File(path, "r+") as file:
            names = list(file)
            for name in chance.sample(names, chance.choice((1, 1, 2, 3))):
                chance.choice(list(HOSTILE))(file, name, place_for(secret, path, name))

        if chance.random() < 0.7:
            return

    data = bytearray(path.read_bytes())
    places = [at for mark in STRUCTURES for at in all_of(data, mark)]

    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(data))
        if chance.random() < 0.8:
            at = min(chance.choice(places) + chance.randrange(600), len(data) - 1)
        data[at] = chance.choice(
            (data[at] ^ (1 << chance.randrange(8)), 0, 255, chance.randrange(256))
        )

    path.write_bytes(data)


def place_for(secret: Path, path: Path, name: str) -> Path:
    """A copy of the secret for one dataset of one case: HDF5 files are made beside it."""
    return Path(shutil.copy(secret, path.parent.parent / f"secret-{path.parent.name}-{name}"))


def all_of(data: bytes, mark: bytes) -> list[int]:
    """Where a mark stands."""
    found = []
    at = data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)

    return found


def read_case(path: Path, out: list[bytes]) -> str:
    """Read all that a store or a source gives into `out`; what became of it."""
    try:
        if path.is_dir():
            read_store(path, out)
        else:
            source = open_features(str(path), "hdf5", ReadOptions())
            for found in source.read([0, min(source.images, 50)]):
                out.append(repr(found).encode())
                if hasattr(found, "regions"):
                    out.append(found.regions.features.tobytes())
    except UsageError as error:
        out.append(str(error).encode())
        return "refused" if str(error).strip() else "refused-without-words"

    return "read"


def read_store(path: Path, out: list[bytes]) -> None:
    """Texts, tokens, languages and every record."""
    store = RegionStore(str(path))
    out.extend(store.caption(number).encode() for number in range(store.num_captions))
    out.append(repr(store.languages().tolist()).encode())
    out.append(store.region_counts().tobytes())

    if store.captions.tokens is not None:
        out.extend(
            (store.captions.tokens.ids.tobytes(), store.captions.tokens.word_starts.tobytes())
        )

    for number in range(store.num_images):
        regions = store.read(number)
        out.extend(
            (
                regions.image_id.encode(),
                regions.features.tobytes(),
                regions.class_ids.tobytes(),
                regions.boxes.tobytes(),
            )
        )


def read_batch(folder: Path) -> None:
    """Read the cases of a folder one after another, with limits that end this process by a
    signal.
    """
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()

    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    for path in sorted(folder.glob("case-*")):
        print(f"begin {path.name}", flush=True)
        signal.alarm(SECONDS)
        out: list[bytes] = []
        outcome = read_case(
            path / "features.hdf5" if (path / "features.hdf5").exists() else path, out
        )
        signal.alarm(0)
        if b"secret of another" in b"\n".join(out):
            outcome = "LEAK"

        print(f"{outcome} {path.name}", flush=True)


def campaign(cases: int, seed: int, folder: Path) -> Counter:
    """Make and read the cases; how they ended.

    AssertionError for a leak, a death by a signal or a traceback.
    """
    prepare(folder)
    outcomes: Counter[str] = Counter()

    for first in range(0, cases, BATCH):
        work = folder / f"batch-{first:05d}"
        work.mkdir()
        for number in range(first, min(first + BATCH, cases)):
            make_case(folder, work / f"case-{number:05d}", random.Random(seed * 1_000_003 + number))

        command = (sys.executable, "-m", "tests.campaigns.hostile_hdf5", "--batch", str(work))
        ended = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, errors="replace"
        )
        last = ended.stdout.strip().rpartition("\n")[2]
        assert ended.returncode == 0, (
            f"seed {seed}: exit code {ended.returncode} after {last!r}: {ended.stderr[-2000:]}"
        )
        assert "secret of another" not in ended.stdout + ended.stderr
        outcomes.update(
            line.split()[0] for line in ended.stdout.splitlines() if not line.startswith("begin")
        )
        assert not set(outcomes) - {"read", "refused"}, ended.stdout
        shutil.rmtree(work)

    assert outcomes.total() == cases

    return outcomes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--read", type=Path, help="read one store or source and say what became of it"
    )
    options = parser.parse_args()
    if options.batch:
        return read_batch(options.batch)

    if options.read:
        out: list[bytes] = []
        print(read_case(options.read, out), out[-1].decode("utf-8", "replace"))
        return None

    with tempfile.TemporaryDirectory() as folder:
        for outcome, count in sorted(campaign(options.cases, options.seed, Path(folder)).items()):
            print(f"{outcome}: {count}")

    print(f"{options.cases} hostile files: nothing read outside, no signal, within memory and time")

    return None


if __name__ == "__main__":
    main()
