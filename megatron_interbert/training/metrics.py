"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsWriter:
    """Rank 0 writes; the others stay silent. On resume, records past the resumed step are dropped first."""

    def __init__(self, save: str, tensorboard_dir: str, is_main: bool, train_iters: int, first_step: int) -> None:
        self.is_main, self.train_iters, self.first_step = is_main, train_iters, first_step
        self.started = time.monotonic()
        self.file: TextIO | None = None
        self.board: SummaryWriter | None = None
        self.bar: tqdm | None = None
        if not is_main:
            return
        if sys.stderr.isatty():
            self.bar = tqdm(total=train_iters, initial=first_step, unit="step", dynamic_ncols=True)
        if save:
            self.file = _open_records(Path(save) / "metrics.jsonl", first_step)
        if tensorboard_dir or save:
            folder = tensorboard_dir or str(Path(save) / "tensorboard")
            self.board = SummaryWriter(folder, purge_step=first_step + 1)

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        if self.bar is not None:
            self.bar.update(steps)

    def write(self, step: int, values: dict[str, float], summary: str, prefix: str = "train") -> None:
        """One record of named figures for a step; `summary` is the task's part of the line for people."""
        if not self.is_main:
            return
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            self.file.write(json.dumps({"step": step, "split": prefix, **finite}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{prefix}/{name}", value, step)
        self.say(self._line(step, values, summary, prefix))

    def _line(self, step: int, values: dict[str, float], summary: str, prefix: str) -> str:
        parts = [f"{prefix} step {step}/{self.train_iters}", summary]
        if "learning_rate" in values:
            done = step - self.first_step
            remaining = (time.monotonic() - self.started) / max(done, 1) * (self.train_iters - step)
            parts += [
                f"lr {values['learning_rate']:.2e}",
                f"grad {values['grad_norm']:.2f}",
                f"{values['samples_per_second']:.0f} samples/s",
                f"eta {int(remaining) // 60}:{int(remaining) % 60:02d}",
            ]
        return " | ".join(parts)

    def say(self, line: str) -> None:
        """One line for people, on rank 0."""
        if self.is_main:
            tqdm.write(line, file=sys.stdout) if self.bar is not None else print(line, flush=True)

    def close(self) -> None:
        """Flush and close everything."""
        for target in (self.bar, self.file, self.board):
            if target is not None:
                target.close()


def _open_records(path: Path, first_step: int) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            if record["step"] <= first_step:
                kept.append(line)
    beside = path.with_suffix(".partial")
    beside.write_text("".join(line + "\n" for line in kept))
    os.replace(beside, path)
    return open(path, "a", encoding="utf-8")
