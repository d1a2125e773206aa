"""Measure how preparation gains from processes that share it: images/s of build-features, and of
extract-features if a detector and photos are given, with 1, 2 and 4 processes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.config.options import option
from megatron_interbert.data.manifest import read_manifest
from megatron_interbert.errors import UsageError
from tools.benchmarks.data import write_tsv
from tools.benchmarks.options import BenchmarkOptions

RANKS = (1, 2, 4)


@dataclass
class Options(BenchmarkOptions):
    """Hold the flags of the benchmark of preparation."""

    GROUP: ClassVar[str] = "measuring"

    images: int = option(2000, "images of made-up features to build a store from", least=1)
    photos: str = option("", "folder of photos to extract regions from")
    detector: str = option("", "detector for them")
    rounds: int = option(3, "times that everything is measured; the best one counts", least=1)


def measure(options: Options) -> dict[str, Any]:
    """Measure all numbers of processes in turn, in each round; print and return images/s."""
    if bool(options.photos) != bool(options.detector):
        raise UsageError("--photos and --detector belong together; give both or none")

    figures: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as place:
        folder = Path(place)
        write_tsv(folder / "features.tsv", options.images)
        commands = {"build-features": ["build-features", str(folder / "features.tsv")]}
        if options.photos:
            words = [options.photos, "--detector", options.detector]
            commands["extract-features"] = ["extract-features", *words]

        for number in range(options.rounds):
            for name, command in commands.items():
                for ranks in RANKS:
                    output = folder / f"{name}-{ranks}-{number}"
                    speed = images_per_second(command, ranks, output)
                    best = figures.setdefault(name, {})
                    best[ranks] = max(best.get(ranks, 0.0), speed)

    for name, speeds in figures.items():
        for ranks, speed in speeds.items():
            print(f"{name}, {ranks} processes: {speed:8.1f} images/s {speed / speeds[1]:6.2f}")

    return {"images_per_second": figures}


def images_per_second(command: Sequence[str], ranks: int, output: Path) -> float:
    """Run a command as several processes of one team, their start included."""
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_interbert", *command),
                *("--output", str(output), "--workers", "1", "--images-per-shard", "16"),
            ],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
            },
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    if any(process.wait() for process in processes):
        raise UsageError(f"{' '.join(command)}: a process has failed; its line is above")

    return read_manifest(output)["images_read"] / (time.perf_counter() - started)
