"""Where a stage runs, and what it writes down."""

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
    """A GPU, or a CPU that is pretended to be one; `scratch` is a folder that all stages share."""

    scratch: Path
    pretended: bool

    @property
    def device(self) -> torch.device:
        """The device that is computed on."""
        return torch.device("cpu" if self.pretended else "cuda")

    @property
    def model(self) -> str:
        """The model that is measured: base, or its tiny stand-in."""
        return "tiny" if self.pretended else "base"

    @property
    def sizes(self) -> ModelConfig:
        """Those of `model` on the data of base_store()."""
        return sizes_of(self.model)

    def choose(self, real: Any, pretended: Any) -> Any:
        """Take one value on a GPU and another on a CPU."""
        return pretended if self.pretended else real

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Time some work, with the device idle before and after."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()

        return time.perf_counter() - began


class Record:
    """The findings of a stage, each written to a file at once: it may be killed at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: list[str] = []

    def note(self, **figures: Any) -> None:
        """Keep figures for the JSON file."""
        self._write(figures=figures)

    def say(self, text: str) -> None:
        """Keep a line for the table."""
        self._write(said=[text])

    def expect(self, holds: bool, text: str) -> None:
        """Keep `text` as a failure unless something holds; the stage goes on."""
        if not holds:
            self.failed.append(text)
            self._write(failed=[text])

    def _write(self, **entry: Any) -> None:
        print(json.dumps(entry), flush=True)  # to the log as well, where it stands among the rest
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
