"""Describe where a stage runs, and record its findings."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from tools.benchmarks.batches import sizes_of


@dataclass(frozen=True)
class Place:
    """Describe a GPU, or a CPU in its place; all stages share the folder `scratch`."""

    scratch: Path
    pretended: bool

    @property
    def device(self) -> torch.device:
        """Return the device to compute on."""
        return torch.device("cpu" if self.pretended else "cuda")

    @property
    def model(self) -> str:
        """Return the name of the model to measure: base, or tiny in its place."""
        return "tiny" if self.pretended else "base"

    @property
    def sizes(self) -> ModelConfig:
        """Return the configuration of `model` for the data of base_store()."""
        return sizes_of(self.model)

    def choose(self, real: Any, pretended: Any) -> Any:
        """Return `real` on a GPU, `pretended` on a CPU."""
        return pretended if self.pretended else real

    def wait(self) -> None:
        """Wait until a GPU has finished its queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds that `work` takes, with the device idle before and after."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()

        return time.perf_counter() - began


class Record:
    """Write a stage's findings to a file immediately: it may be killed at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: list[str] = []

    def note(self, **figures: Any) -> None:
        """Record figures for the JSON file."""
        self._write(figures=figures)

    def say(self, text: str) -> None:
        """Record a line for the table."""
        self._write(said=[text])

    def expect(self, holds: bool, text: str) -> None:
        """Record `text` as a failure unless `holds`; the stage continues either way."""
        if not holds:
            self.failed.append(text)
            self._write(failed=[text])

    def _write(self, **entry: Any) -> None:
        print(json.dumps(entry), flush=True)  # also to the log, in sequence with the other output
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
