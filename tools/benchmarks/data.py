"""Measure the loader against bare reads and LMDB, memory over many steps, building of stores and
mining of negatives.
"""

import base64
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from megatron_interbert.config.options import option
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.shard_file import COLUMNS
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from tools.benchmarks.mining import grow, made_up_captions, measure_mining, read_captions
from tools.benchmarks.options import BenchmarkOptions

REGIONS = 36
FEATURES = 2048
CLASSES = 1601
LABELS = 10
ROOT = Path(__file__).resolve().parents[2]
AIM = 20_000  # samples/s that the loader should reach for a fast GPU
WORKERS = 16  # loader processes per GPU, for the extrapolation


@dataclass
class Options(BenchmarkOptions):
    """Measure the loader, its memory, building of stores and mining of negatives."""

    parts: str = option("loader,memory,building,mining", "what to measure, comma-separated")
    images: int = option(4000, "images of the loader's store, 150 kB each", least=1)
    images_per_shard: int = option(1024, "images per shard of the loader's store", least=1)
    batch: int = option(64, "samples per micro-batch", least=1)
    rounds: int = option(7, "alternating repeats of each way", least=1)
    steps: int = option(10_000, "batches over which memory is observed", least=1)
    mining_sizes: list[int] = option(
        (25_000, 100_000, 400_000), "numbers of captions to mine", several=True, read=int
    )
    mining_sample: int = option(0, "search only this many captions of each size; 0: all")
    captions: str = option(
        "",
        "captions_*.json of COCO for realistic texts (mining: or lines with an image's name and a"
        " caption); default: made-up words",
        group="data",
    )
    vocab_file: str = option(
        "", "WordPiece vocabulary; default: the words of the captions", group="data"
    )


def measure(options: Options) -> dict[str, Any]:
    """Measure the parts of --parts, print their tables and return their figures."""
    parts = {"loader": loader, "memory": memory, "building": building, "mining": mining}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder = Path(name)
        if {"loader", "memory"} & set(options.parts.split(",")):
            write_store(folder / "store", options)
        return {part: parts[part](folder, options) for part in options.parts.split(",")}


def made_up_image(random: np.random.Generator, number: int) -> Regions:
    """Make 36 random regions of an image of 640 x 480 pixels."""
    corner = random.uniform(0, [400, 300], size=(REGIONS, 2))
    boxes = np.concatenate([corner, corner + random.uniform(20, 180, size=(REGIONS, 2))], axis=1)
    ids = np.stack([random.choice(CLASSES, LABELS, replace=False) for _ in range(REGIONS)])
    # as after a ReLU
    features = random.normal(size=(REGIONS, FEATURES)).clip(0).astype(np.float32)

    return Regions(
        f"{number:08d}",
        (640.0, 480.0),
        features,
        boxes.astype(np.float32),
        ids,
        np.full(ids.shape, 0.09, np.float32),
    )


def captions_for(count: int, options: Options) -> list[str]:
    """Return `count` captions, those of --captions first."""
    return grow(
        read_captions(options.captions) if options.captions else made_up_captions(25_000), count
    )


def write_store(path: Path, options: Options) -> None:
    """Write the loader's store; its features are noise, which does not affect reading."""
    random = np.random.default_rng(0)
    captions = captions_for(options.images, options)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for c in captions for w in c.lower().split()}),
    ]

    vocabulary = (
        Path(options.vocab_file).read_text(encoding="utf-8")
        if options.vocab_file
        else "\n".join(words) + "\n"
    )

    facts = {
        "feature_dim": FEATURES,
        "num_classes": CLASSES,
        "detector": {"name": "noise"},
        "soft_labels": "top_k",
    }
    some = [made_up_image(random, number) for number in range(64)]

    with RegionStoreWriter(
        path, **facts, vocabulary=vocabulary, images_per_shard=options.images_per_shard
    ) as writer:
        for number, caption in enumerate(captions):
            regions = some[number % len(some)]
            writer.add(
                Regions(f"{number:08d}", regions.size, *list(vars(regions).values())[2:]),
                [(caption, "en")],
            )


def stream(folder: Path, options: Options, workers: int) -> Iterator[PackedBatch]:
    """Yield pretraining batches with everything on: masks, negatives, balance, packing."""
    config = RunConfig(
        micro_batch_size=options.batch,
        global_batch_size=options.batch,
        num_workers=workers,
        data_partitions=8,
    )
    store = str(folder / "store")

    return iter(
        BatchStream(
            PretrainingSet(Corpus([store]), CaptionTokenizer(f"{store}/vocab.txt"), config),
            0,
            options.batch,
            0,
            1,
        )
    )


def bare_reads(folder: Path, batch: int) -> Callable[[], int]:
    """Return a function that reads all bytes of the shards in order, a record at a time, into the
    memory of one batch, and returns the number of images.
    """
    rows = {"image_features": FEATURES, "image_bb": 4, "class_ids": LABELS, "class_probs": LABELS}
    record = REGIONS * sum(width * np.dtype(COLUMNS[name]).itemsize for name, width in rows.items())
    memory = list(np.empty((batch, record), np.uint8))
    files = [os.open(path, os.O_RDONLY) for path in sorted((folder / "store").glob("shard-*.h5"))]

    def read() -> int:
        images = 0
        for file in files:
            for place in range(os.fstat(file).st_size // record):
                os.preadv(file, [memory[images % batch]], place * record)
                images += 1

        return images

    return read


def lmdb_reads(folder: Path, options: Options) -> Callable[[], int]:
    """Return a function that reads the same records from an LMDB in random order, copying each into
    its batch's memory as a loader must, and returns the number of images.
    """
    corpus = Corpus([str(folder / "store")])
    store = corpus.stores[0]
    random = np.random.default_rng(1)
    environment = lmdb.open(str(folder / "records.lmdb"), map_size=1 << 34)

    with environment.begin(write=True) as transaction:
        for number in range(store.num_images):
            r = store.read(number)
            parts = (r.features, r.boxes, r.class_ids, r.class_probs)
            transaction.put(b"%08d" % number, b"".join(part.tobytes() for part in parts))

    size = REGIONS * (FEATURES * 2 + 16 + LABELS * 8)
    memory = np.empty((options.batch, size), np.uint8)

    def read() -> int:
        with environment.begin(buffers=True) as view:
            for place, number in enumerate(random.permutation(store.num_images)):
                memory[place % options.batch] = np.frombuffer(view.get(b"%08d" % number), np.uint8)

        return store.num_images

    return read


def loader_reads(batches: Iterator[PackedBatch], options: Options) -> Callable[[], int]:
    """Return a function that takes an epoch's worth of batches and returns their samples."""

    def read() -> int:
        return sum(len(next(batches)) for _ in range(options.images // options.batch))

    return read


def rates(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Return the images/s of each way in each round, in turns, after a warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in ways}

    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            images = way()
            if number:
                found[name].append(images / (time.perf_counter() - started))

    return found


def loader(folder: Path, options: Options) -> dict[str, Any]:
    """Measure the images/s of loader processes and of the ways they are compared with."""
    streams = {f"loader, {n} process{'es' * (n > 1)}": stream(folder, options, n) for n in (1, 2)}
    ways = {
        "bare sequential read of the same bytes, one core": bare_reads(folder, options.batch),
        "LMDB of the same records, random, one core": lmdb_reads(folder, options),
        "batches made in the training process": loader_reads(stream(folder, options, 0), options),
        **{name: loader_reads(batches, options) for name, batches in streams.items()},
    }
    found = rates(ways, options.rounds)
    bare = found["bare sequential read of the same bytes, one core"]
    print(
        f"{options.images} images of {REGIONS} x {FEATURES}, batch {options.batch}, medians of"
        f" {options.rounds} rounds in turns"
    )
    result: dict[str, Any] = {}

    for name, values in found.items():
        ratio = statistics.median(v / b for v, b in zip(values, bare, strict=True))
        result[name] = {"images_per_second": statistics.median(values), "of_bare_read": ratio}
        print(
            f"{name:<52}{statistics.median(values):>9.0f} images/s {ratio:>6.2f} of the bare read"
        )

    one = result["loader, 1 process"]["images_per_second"]
    result["sixteen_processes"] = WORKERS * one
    print(
        f"{WORKERS} processes, extrapolated: {WORKERS * one:.0f} samples/s,"
        f" {WORKERS * one / AIM:.1f} times the target of {AIM}"
    )

    return result


def resident(pid: int) -> int:
    """Return the anonymous resident memory of a process in kB."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as handle:
        return next(int(line.split()[1]) for line in handle if line.startswith("RssAnon"))


def memory(folder: Path, options: Options) -> dict[str, Any]:
    """Measure the memory of the training process and of a loader process over many steps."""
    others = {child.pid for child in multiprocessing.active_children()}
    batches = stream(folder, options, 1)
    first = max(options.steps // 20, 1)
    for _ in range(first):
        next(batches)

    (mine,) = {child.pid for child in multiprocessing.active_children()} - others
    pids = {"training process": os.getpid(), "loader process": mine}
    before = {name: resident(pid) for name, pid in pids.items()}
    for _ in range(options.steps - first):
        next(batches)

    after = {name: resident(pid) for name, pid in pids.items()}
    for name in pids:
        grown = after[name] - before[name]
        print(
            f"{name}: {before[name] / 1024:.1f} MiB after {first} steps, {grown / 1024:+.1f} MiB"
            f" after {options.steps}"
        )

    return {"steps": options.steps, "kilobytes_before": before, "kilobytes_after": after}


def write_tsv(path: Path, images: int) -> None:
    """Write random images as a TSV with LXMERT's columns."""
    random = np.random.default_rng(2)
    some = [made_up_image(random, number) for number in range(16)]

    def encoded(values: np.ndarray) -> str:
        return base64.b64encode(np.ascontiguousarray(values)).decode()

    nothing = encoded(np.zeros(REGIONS, np.int64))
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(images):
            r = some[number % len(some)]
            classes = (encoded(r.class_ids[:, 0].clip(1) - 1), encoded(r.class_probs[:, 0]))
            values = (
                number,
                480,
                640,
                *classes,
                nothing,
                nothing,
                REGIONS,
                encoded(r.boxes),
                encoded(r.features),
            )
            handle.write("\t".join(map(str, values)) + "\n")


def decode_only(path: Path) -> None:
    """Read all lines and decode their features, the least that any conversion must do."""
    with open(path, "rb") as handle:
        for line in handle:
            np.frombuffer(base64.b64decode(line.rsplit(b"\t", 1)[1]), np.float32).astype(np.float16)


def building(folder: Path, options: Options) -> dict[str, Any]:
    """Measure the MB/s of TSV that the command builds into a store, its start included, against
    reading and decoding alone.
    """
    path = folder / "features.tsv"
    write_tsv(path, max(options.images // 2, 64))
    megabytes = path.stat().st_size / 1e6
    speeds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> None:
        started = time.perf_counter()
        function()
        speeds.setdefault(name, []).append(megabytes / (time.perf_counter() - started))

    def convert(workers: int, number: int) -> None:
        command = (
            sys.executable,
            ROOT / "tools" / "build_features.py",
            path,
            "--output",
            folder / f"built-{workers}-{number}",
        )

        subprocess.run(
            [*map(str, command), "--images-per-shard", "128", "--workers", str(workers)],
            check=True,
            capture_output=True,
        )

    for number in range(max(options.rounds // 2, 1)):
        timed("read and decode only, one core", lambda: decode_only(path))
        for workers in (1, 2):
            timed(
                f"build, {workers} process{'es' * (workers > 1)}",
                lambda w=workers, n=number: convert(w, n),
            )

    floor = statistics.median(speeds["read and decode only, one core"])
    for name, values in speeds.items():
        print(
            f"{name:<52}{statistics.median(values):>9.0f} MB/s of TSV"
            f" {statistics.median(values) / floor:>6.2f}"
        )

    return {name: statistics.median(values) for name, values in speeds.items()}


def mining(folder: Path, options: Options) -> dict[str, Any]:
    """Measure seconds, recall and growth of TF-IDF mining."""
    sizes: Sequence[int] = options.mining_sizes
    found = measure_mining(sizes, os.cpu_count() or 1, 100, options.captions, options.mining_sample)
    for run in found["runs"]:
        print(
            "mining:",
            ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in run.items()
            ),
        )

    for name, fit in found.items():
        if isinstance(fit, dict):
            print(
                f"{name}: grows with the power {fit['exponent']:.2f}, {fit['at_3300000']:.0f} at"
                " 3.3 M captions"
            )

    return found
