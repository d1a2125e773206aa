"""Finetune on each task of a generated world, alone and all at once, beside what one side tells.

For every seed: pretrain on the world's scenes; finetune on each task for the same steps, and once
on all tasks together for as many steps in all; evaluate each on unseen scenes. Finished runs are
not repeated, so a stopped study is resumable. Writes OUTPUT/tasks.json and OUTPUT/tasks.md.

    interbert make-sample --output world --tasks
    python tools/compare_tasks.py --world world/tasks --output study
"""

import dataclasses
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

import megatron_interbert
from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, nearest, option
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import check_writable, write_json, write_text
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json
from megatron_interbert.weights.manifest import newest_checkpoint, versions
from tools.studies.options import read_seeds
from tools.studies.variant_run import reason_of
from tools.studies.world_tasks import (
    evaluation_flags,
    flags_of_tasks,
    main_figure,
    training_flags,
)

ALONE = "alone"
TOGETHER = "together"
Result = dict[str, Any]  # what result.json holds


@dataclass
class Options(Flags):
    """Hold the flags of the study."""

    GROUP: ClassVar[str] = "data"

    world: str = option("", "folder tasks/ of a generated world", required=True)
    output: str = option("", "folder for all runs and the table", required=True)
    model: str = option("sample", "preset or JSON file of sizes", group="model")
    only: str = option("", "tasks, comma-separated; default: all", group="study")
    seeds: str = option("1,2,3", "seeds, comma-separated", group="study")
    pretrain_iters: int = option(6000, "steps of pretraining", least=1, group="optimisation")
    train_iters: int = option(2000, "steps of each finetuning", least=1, group="optimisation")
    batch_size: int = option(64, "samples per step", least=1, group="optimisation")
    together: bool = option(True, "also train on all tasks at once", group="study")
    pretrain_flags: str = option(
        "--lr 2e-3 --lr-warmup-fraction 0.05 --adam-beta2 0.98 --no-msm-on-mismatched",
        "further flags of pretrainings",
        group="optimisation",
    )
    finetune_flags: str = option(
        "--lr 1e-3 --lr-warmup-fraction 0.05 --adam-beta2 0.98",
        "further flags of finetunings",
        group="optimisation",
    )
    jobs: int = option(
        os.cpu_count() or 1, "seeds at a time, one core each", least=1, group="study"
    )


class SeedRuns:
    """Train and evaluate everything for one seed, in a folder of its own."""

    def __init__(self, options: Options, tasks: dict[str, dict[str, str]], seed: int) -> None:
        self.options = options
        self.tasks = tasks
        self.seed = seed
        self.folder = Path(options.output) / f"seed-{seed}"

    def results(self) -> dict[str, dict[str, Result]]:
        """Return the results of each task, alone and together, running what is missing."""
        start = self._pretrain()
        found: dict[str, dict[str, Result]] = {}

        for task, flags in self.tasks.items():
            run = self._train(
                self.folder / task,
                self.options.train_iters,
                ("finetune", task, "--init-from", start),
                words_of(training_flags(flags, task)),
            )
            found[task] = {ALONE: self._evaluate(task, run)}

        if self.options.together:
            run = self._together(start)
            for task in self.tasks:
                found[task][TOGETHER] = self._evaluate(task, run)

        return found

    def _pretrain(self) -> Path:
        data = ("--model", self.options.model, "--data-path", f"{self.options.world}/train")
        return self._train(
            self.folder / "pretrained", self.options.pretrain_iters, ("pretrain",), data
        )

    def _together(self, start: Path) -> Path:
        flags = {task: training_flags(flags, task) for task, flags in self.tasks.items()}
        file = self.folder / "tasks.yaml"
        write_text(file, yaml.safe_dump(flags, sort_keys=False))
        steps = self.options.train_iters * len(self.tasks)
        command = ("finetune", "multitask", "--init-from", start, "--task-flags", file)

        return self._train(self.folder / "all", steps, command, ())

    def _train(
        self, save: Path, steps: int, command: tuple[object, ...], more: tuple[object, ...]
    ) -> Path:
        done = newest_checkpoint(save) if save.is_dir() else None
        if done is None or done.name != f"global_step{steps}":
            options = self.options
            further = options.pretrain_flags if command[0] == "pretrain" else options.finetune_flags
            batch = ("--micro-batch-size", options.batch_size)
            batch += ("--global-batch-size", options.batch_size)
            usual = ("--num-workers", 0, "--log-interval", 100, "--seed", self.seed)
            length = ("--train-iters", steps, "--save", save)
            self._call(*command, *more, *batch, *usual, *shlex.split(further), *length)

        return save

    def _evaluate(self, task: str, run: Path) -> Result:
        folder = run / "evaluation" / task
        if not (folder / "result.json").is_file():
            flags = words_of(evaluation_flags(self.tasks[task], task))
            self._call("evaluate", task, "--load", run, *flags, "--output", folder)

        return read_json(folder / "result.json", "--output")

    def _call(self, entry: object, *flags: object) -> None:
        command = [sys.executable, "-m", f"megatron_interbert.{entry}", *map(str, flags)]
        root = str(Path(megatron_interbert.__file__).resolve().parents[1])
        cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, **cpu, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        ended = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False
        )

        if ended.returncode:
            raise TrainingStopped(
                f"{self.folder}: {shlex.join(command)} ended with code {ended.returncode}:"
                f" {reason_of(ended.stderr.strip() or ended.stdout.strip())}"
            )


def words_of(flags: dict[str, str]) -> tuple[str, ...]:
    """Return flags as words of a command line."""
    return tuple(word for name, value in flags.items() for word in (f"--{name}", value))


def chosen_tasks(options: Options) -> dict[str, dict[str, str]]:
    """Return the flags of the tasks in --only, or of all; raises UsageError for unknown ones."""
    every = flags_of_tasks(Path(options.world))
    names = [name for name in options.only.split(",") if name] or list(every)
    for name in names:
        if name not in every:
            raise UsageError(f"--only: unknown task '{name}'{nearest(name, every)}")

    return {name: every[name] for name in names}


def table(found: list[dict[str, dict[str, Result]]]) -> str:
    """Return a Markdown table of each task's main figure: by one side alone, and ours, as mean and
    standard deviation over seeds.
    """
    lines = [
        "| task | figure | one side alone, at best | alone | together |",
        "|---|---|---|---|---|",
    ]

    for task in found[0]:
        figure = main_figure(task)
        beside = found[0][task][ALONE].get("beside", [])
        best = max((peer["figures"].get(figure, 0.0) for peer in beside), default=None)
        cells = [
            spread([seed[task][how]["metrics"][figure] for seed in found if how in seed[task]])
            for how in (ALONE, TOGETHER)
        ]
        side = "" if best is None else f"{best:.1f}"
        lines.append(f"| {task} | {figure} | {side} | {' | '.join(cells)} |")

    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return `71.2 ± 0.8`, or an empty text without values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def run(options: Options) -> None:
    """Run what is missing and write the table."""
    seeds = read_seeds(options.seeds)
    tasks = chosen_tasks(options)
    if not (Path(options.world) / "train" / MANIFEST).is_file():
        raise UsageError(f"--world {options.world}: no region store train/ there")
    check_writable(Path(options.output), "--output")

    runs = [SeedRuns(options, tasks, seed) for seed in seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(SeedRuns.results, runs)
        found = list(progress(results, total=len(runs), unit="seed", desc="tasks"))

    note = (
        f"{options.pretrain_iters} steps of pretraining, {options.train_iters} of finetuning on a"
        f" task, {options.batch_size} samples each, seeds {options.seeds}; generated scenes"
    )
    text = f"{table(found)}\n\n{note}\n"
    write_text(Path(options.output) / "tasks.md", text)
    write_json(
        Path(options.output) / "tasks.json",
        {"results": found, "options": dataclasses.asdict(options), "versions": versions()},
    )
    print(text)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
