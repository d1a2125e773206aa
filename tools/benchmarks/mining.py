"""Measure hard-negative mining at growing sizes: seconds, memory, and recall of what brute force
finds; extrapolate them.
"""

import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.preparation.mining.index import build_index
from megatron_interbert.preparation.mining.search import MiningOptions, Searcher

CONCEPTUAL_CAPTIONS = 3_300_000  # captions of the paper's largest corpus

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "or")]


def read_captions(path: str | Path) -> list[str]:
    """Read the captions of a COCO annotation file (.json), or of lines with an image's name and a
    caption.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        return [record["caption"] for record in json.loads(text)["annotations"]]

    return [line.split(maxsplit=1)[1] for line in text.splitlines() if len(line.split()) > 1]


def made_up_captions(count: int, seed: int = 0) -> list[str]:
    """Return captions of invented words drawn by Zipf's law, in place of real ones."""
    random = np.random.default_rng(seed)
    chance = 1 / np.arange(3, 5003)
    words = [_name(random, 2) for _ in range(5000)]
    drawn = iter(random.choice(words, size=count * 8, p=chance / chance.sum()))

    return [" ".join(next(drawn) for _ in range(random.integers(4, 9))) for _ in range(count)]


def _name(random: np.random.Generator, syllables: int) -> str:
    return "".join(SYLLABLES[i] for i in random.integers(len(SYLLABLES), size=syllables))


def grow(seeds: list[str], size: int, seed: int = 0, rare: float = 0.15) -> list[str]:
    """Return `size` SYNTHETIC captions: the seeds, then halves of two of them joined at a word that
    both have.

    A share `rare` of the new ones gets a made-up name, old or new, so that the vocabulary keeps
    growing with a power of the size (Heaps' law, exponent near 0.5) as in real corpora. Joined
    halves repeat the seeds' phrases, so captions are more similar than in a real corpus of that
    size. Captions without spaces are joined at a character.
    """
    random = np.random.default_rng(seed)
    space = " " if any(" " in caption for caption in seeds[:size]) else ""
    words = [caption.split() if space else list(caption) for caption in seeds[:size]]
    holders: dict[str, list[tuple[int, int]]] = {}
    for number, row in enumerate(words):
        for place, word in enumerate(row):
            holders.setdefault(word.lower(), []).append((number, place))

    result = list(seeds[:size])
    names = 0

    while len(result) < size:
        first = words[random.integers(len(words))]
        if not first:
            continue

        cut = int(random.integers(len(first)))
        other, place = holders[first[cut].lower()][
            random.integers(len(holders[first[cut].lower()]))
        ]
        joined = first[:cut] + words[other][place:]

        if random.random() < rare:
            names += 1
            rank = names ** (1 - random.random() * 0.9)  # mostly old names, sometimes the newest
            joined.insert(
                int(random.integers(len(joined) + 1)), _name(np.random.default_rng(int(rank)), 4)
            )

        result.append(space.join(joined))

    return result


def brute_force(searcher: Searcher, caption: int) -> np.ndarray:
    """Return the negatives of a caption from its similarity to each other row, int64 [<= K]."""
    index = searcher.index
    first_holders = index.holders[index.holder_starts[:-1]]
    of_rows = searcher.similarity(np.full(len(first_holders), caption), first_holders)
    similarity = of_rows[index.row_of]
    allowed = (
        (similarity > 0)
        & (similarity < searcher.options.max_similarity)
        & (index.images != index.images[caption])
        & (index.row_of != index.row_of[caption])
    )
    chosen = np.flatnonzero(allowed)

    return chosen[np.lexsort((chosen, -similarity[allowed]))][: searcher.options.top]


def measure_size(
    captions: list[str], threads: int, recall_sample: int, search_sample: int
) -> dict[str, float]:
    """Measure seconds, bytes and recall of mining these captions, five per image.

    The search is compiled before the clock starts. Only `search_sample` captions are searched
    (0: all), and the seconds extrapolated to all.
    """
    options = MiningOptions()
    number = len(captions)
    small = Searcher(build_index(captions[:1000], np.arange(1000) // 5), options, threads)
    small.search(np.arange(100))
    brute_force(small, 0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = peak_kilobytes()
    clock = time.perf_counter()
    index = build_index(captions, np.arange(number) // 5)
    indexed = time.perf_counter() - clock
    searcher = Searcher(index, options, threads)
    drawn = np.random.default_rng(0).permutation(number)[: search_sample or number]
    clock = time.perf_counter()
    processor = time.process_time()
    found, _ = searcher.search(drawn)
    searched = (time.perf_counter() - clock) * number / len(drawn)
    processor = (time.process_time() - processor) * number / len(drawn)
    peak = peak_kilobytes()
    clock = time.perf_counter()
    wanted = [brute_force(searcher, caption) for caption in drawn[:recall_sample]]
    brute = (time.perf_counter() - clock) * number / len(wanted)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(wanted, found, strict=False))

    return {
        "captions": number,
        "rows": len(index.starts) - 1,
        "terms": len(index.list_starts) - 1,
        "entries_per_row": len(index.places) / (len(index.starts) - 1),
        "index_seconds": indexed,
        "search_seconds": searched,
        "search_processor_seconds": processor,
        "brute_force_seconds_on_one_core": brute,
        "captions_per_second": number / (indexed + searched),
        "peak_megabytes": peak / 1024,
        "peak_bytes_per_caption": (peak - before) * 1024 / number,
        "searched": len(drawn),
        "compared": len(wanted),
        "recall": hits / max(sum(map(len, wanted)), 1),
    }


def peak_kilobytes() -> int:
    """Return the peak memory of this process in kB since its last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _measure(
    send: Any, size: int, threads: int, recall_sample: int, search_sample: int, path: str | None
) -> None:
    captions = grow(read_captions(path) if path else made_up_captions(25_000), size)
    send.send(measure_size(captions, threads, recall_sample, search_sample))


def fit_power(sizes: Sequence[float], seconds: Sequence[float], size: float) -> tuple[float, float]:
    """Return the exponent of the power law through the points (least squares of logarithms), and
    its value at `size`.
    """
    exponent, constant = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(exponent), float(np.exp(constant + exponent * np.log(size)))


def measure_mining(
    sizes: Sequence[int],
    threads: int,
    recall_sample: int,
    path: str | None = None,
    search_sample: int = 0,
) -> dict[str, Any]:
    """Measure mining at each of `sizes` in a fresh process, and extrapolate to 3.3 M captions.

    Captions start with real ones (from a file, `path`) or made-up ones as the seed; beyond the seed
    they are SYNTHETIC (`grow`).
    """
    runs = []
    context = multiprocessing.get_context("spawn")

    for size in sizes:
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(
            target=_measure, args=(send, size, threads, recall_sample, search_sample, path)
        )
        worker.start()
        send.close()
        runs.append(receive.recv())
        worker.join()

    result = {
        "seed": Path(path).name if path else "made-up captions",
        "captions": "synthetic beyond the seed",
        "threads": threads,
        "runs": runs,
    }
    if len(runs) > 1:
        for name in (
            "index_seconds",
            "search_seconds",
            "search_processor_seconds",
            "brute_force_seconds_on_one_core",
        ):
            exponent, there = fit_power(
                [run["captions"] for run in runs], [run[name] for run in runs], CONCEPTUAL_CAPTIONS
            )
            result[name] = {"exponent": exponent, "at_3300000": there}

    return result
