"""Run the stages of a study, trainings and evaluations, each in a process of its own. What is
finished is not repeated, and never taken for the result of other options.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megatron_interbert
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import write_text
from megatron_interbert.reading import read_json, read_text
from megatron_interbert.weights.manifest import newest_checkpoint


@dataclass(frozen=True)
class Written:
    """Hold the path of a file that a study has written for a stage."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


class Stages:
    """Run stages whose places are in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, save: Path, steps: int, *command: object, seed: int) -> Path:
        """Train until a checkpoint of `steps` is in `save`; return `save`."""
        self.same(save, flags_of(save), json.dumps([*map(content_of, command), str(steps)]))
        done = newest_checkpoint(save) if save.is_dir() else None
        if done is None or done.name != f"global_step{steps}":
            self.call(*command, "--seed", seed, "--train-iters", steps, "--save", save)

        return save

    def evaluate(self, folder: Path, *command: object) -> dict[str, Any]:
        """Evaluate into a folder; return its result.json."""
        self.same(folder, flags_of(folder), json.dumps([*map(content_of, command)]))
        result = folder / "result.json"
        if not result.is_file():
            self.call("evaluate", *command, "--output", folder)

        return read_json(result, "--output")

    def same(self, place: Path, record: Path, text: str) -> None:
        """Record the options of a stage; raises UsageError if it was made with others, or if that
        is unknown.
        """
        mend = f"choose another --output, or remove {self.folder}"
        if record.is_file() and read_text(record, "--output") != text:
            raise UsageError(f"{place}: made with other options than now ({record.name}); {mend}")
        if os.path.lexists(place) and not record.is_file():
            raise UsageError(
                f"{place}: {record.name} is missing, which records the options it was made with;"
                f" {mend}"
            )

        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, text)

    def call(self, entry: object, *flags: object) -> None:
        """Run an entry point of the package with flags; raises TrainingStopped if it fails."""
        command = [sys.executable, "-m", f"megatron_interbert.{entry}", *map(str, flags)]
        root = str(Path(megatron_interbert.__file__).resolve().parents[1])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
            **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
        }
        ended = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False
        )

        if ended.returncode:
            raise TrainingStopped(
                f"{self.folder}: {shlex.join(command)} ended with code {ended.returncode}:"
                f" {reason_of(ended.stderr.strip() or ended.stdout.strip())}"
            )


def reason_of(printed: str) -> str:
    """Return the last line that names an error, else the last one of all."""
    lines = printed.splitlines()
    named = [line for line in lines if line.startswith("error:")]

    return (named or lines or [""])[-1]


def flags_of(place: Path) -> Path:
    """Return the file that records the flags of a stage."""
    return place.with_name(f"{place.name}.flags.json")


def content_of(word: object) -> str:
    """Return a word of a command line; of a list or settings that a study has written its content,
    which may change where the path does not.
    """
    written = isinstance(word, Written)
    return f"{word.path.name}: {read_text(word.path, '--output')}" if written else str(word)
