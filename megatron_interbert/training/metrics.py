"""Report a run's progress: a progress bar or plain lines, metrics.jsonl, TensorBoard.

A failure to write any of them does not stop the run.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_interbert.board import Board
from megatron_interbert.files import append, encoded, write_text
from megatron_interbert.reading import read_regular

RECORDS = "metrics.jsonl"


def memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: allocated on the GPU, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Records:
    """Write metrics.jsonl, one JSON object per line.

    Records past the step that the run resumes from are dropped first.
    """

    def __init__(self, path: Path, first_step: int, say: Callable[[str], None]) -> None:
        self.path = path
        self.first_step = first_step
        self.say = say
        self._begun = False

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append a record of named metrics; on OSError no part of it has been written."""
        if not self._begun:
            self._begin()

        finite = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }  # JSON has no NaN
        append(self.path, encoded(json.dumps({"step": step, "split": split, **finite}) + "\n"))

    def _begin(self) -> None:
        """Drop the records past the first step, by writing a new file and renaming it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        records = [line for line in lines if step_of(line) is not None]
        kept = [line + "\n" for line in records if step_of(line) <= self.first_step]
        write_text(self.path, "".join(kept))
        self._begun = True

        if len(records) < len(lines):
            dropped = len(lines) - len(records)
            self.say(f"note: {self.path}: {dropped} lines were not records and are dropped")

    def _lines(self) -> list[str]:
        try:
            text = read_regular(self.path).decode("utf-8", "replace")
        except FileNotFoundError:
            return []

        whole, _, cut = text.rpartition("\n")  # a killed run may leave half a line
        return [
            line for line in [*whole.split("\n"), cut if step_of(cut) is not None else ""] if line
        ]


def step_of(line: str) -> int | None:
    """Return the step in a line of metrics.jsonl; None if the line is not a record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None

    return step if type(step) is int else None


class MetricsWriter:
    """Write metrics and lines for people, on rank 0 only."""

    def __init__(
        self, save: str, tensorboard_dir: str, is_main: bool, train_iters: int, first_step: int
    ) -> None:
        self.is_main = is_main
        self.train_iters = train_iters
        self.first_step = first_step
        self.started = time.monotonic()
        self.sinks: list[Records | Board] = []
        self.bar: tqdm | None = None
        self._failing: set[Path] = set()
        if not is_main:
            return

        if sys.stderr.isatty():
            self.bar = tqdm(total=train_iters, initial=first_step, unit="step", dynamic_ncols=True)
        if save:
            self.sinks.append(Records(Path(save) / RECORDS, first_step, self.say))
        if tensorboard_dir or save:
            self.sinks.append(
                Board(Path(tensorboard_dir or Path(save) / "tensorboard"), first_step)
            )

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        if self.bar is not None:
            self.bar.update(steps)

    def write(
        self, step: int, values: dict[str, float], summary: str, prefix: str = "train"
    ) -> None:
        """Write one record of named metrics for a step.

        `summary` is the task's part of the printed line.
        """
        if not self.is_main:
            return

        for sink in self.sinks:
            self._try(sink.path, lambda sink=sink: sink.write(step, prefix, values))

        self.say(self._line(step, values, summary, prefix))

    def _try(self, path: Path, write: Callable[[], None]) -> None:
        """Call `write`; report once when it starts to fail and once when it works again."""
        try:
            write()
        except OSError as error:
            if path not in self._failing:
                self.say(f"note: {path} cannot be written ({error.strerror}); training continues")
            self._failing.add(path)
            return

        if path in self._failing:
            self._failing.remove(path)
            self.say(f"note: {path} can be written again")

    def _line(self, step: int, values: dict[str, float], summary: str, prefix: str) -> str:
        parts = [f"{prefix} step {step}/{self.train_iters}", summary]
        if "learning_rate" in values:
            done = step - self.first_step
            rate = values["samples_per_second"]
            remaining = (time.monotonic() - self.started) / max(done, 1) * (self.train_iters - step)
            parts += [
                f"lr {values['learning_rate']:.2e}",
                f"grad {values['grad_norm']:.2f}",
                f"{rate:.{0 if rate >= 10 else 2}f} samples/s",
                f"eta {int(remaining) // 60}:{int(remaining) % 60:02d}",
            ]

        return " | ".join(parts)

    def say(self, line: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if self.is_main:
            tqdm.write(line, file=sys.stdout) if self.bar is not None else print(line, flush=True)

    def close(self) -> None:
        """Close the progress bar; records are on disk already."""
        if self.bar is not None:
            self.bar.close()
