"""Finetune on each task of a generated world, alone and all at once, beside what one side tells.

For every seed: pretrain on the world's scenes; finetune on each task for the same steps, and once
on all tasks together, by default for as many steps in all; evaluate each on unseen scenes.
Finished runs are not repeated, so a stopped study is resumable. Writes OUTPUT/tasks.json and
OUTPUT/tasks.md.

    interbert make-sample --output world --tasks
    python tools/compare_tasks.py --world world/tasks --output study
"""

import dataclasses
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_writable, write_json, write_text
from megatron_interbert.progress import progress
from megatron_interbert.weights.manifest import versions
from tools.studies.options import read_seeds
from tools.studies.world_runs import Result, WorldOptions, WorldRun, chosen
from tools.studies.world_tasks import WorldTask, tasks_of

ALONE = "alone"
TOGETHER = "together"
Found = dict[str, dict[str, Result]]  # by task, alone and together


@dataclass
class Options(WorldOptions):
    """Hold the flags of the study."""

    only: str = option("", "tasks, comma-separated; default: all", group="study")
    together: bool = option(True, "also train on all tasks at once", group="study")
    together_iters: int = option(
        0,
        "steps on all tasks at once; 0: as many as all of them take alone",
        least=0,
        group="study",
    )

    def check(self) -> None:
        """Raise UsageError if steps are given to a run that is left out."""
        super().check()
        if self.together_iters and not self.together:
            raise UsageError("--together-iters: nothing is trained at once with --no-together")

    def steps_together(self, tasks: int) -> int:
        """Return the steps of a run on so many tasks at once; 0 if there is no such run."""
        if not self.together or tasks < 2:
            return 0

        return self.together_iters or tasks * self.train_iters


def results_of(options: Options, tasks: dict[str, WorldTask], seed: int) -> Found:
    """Return the results of each task for a seed, alone and together, running what is missing."""
    run = WorldRun(options, Path(options.output) / f"seed-{seed}", seed)
    start = run.pretrain(options.model)
    found: Found = {}

    for name, task in tasks.items():
        tuned = run.finetune(name, task.command, start, task.training(), options.train_iters)
        found[name] = {ALONE: run.evaluate(name, task, tuned)}

    if steps := options.steps_together(len(tasks)):
        tuned = run.finetune_together("all", tasks, start, steps)
        for name, task in tasks.items():
            found[name][TOGETHER] = run.evaluate(name, task, tuned)

    return found


def table(found: list[Found], tasks: dict[str, WorldTask]) -> str:
    """Return a Markdown table of each task's main figure: by one side alone, and ours, as mean and
    standard deviation over seeds.
    """
    lines = [
        "| task | figure | one side alone, at best | alone | together |",
        "|---|---|---|---|---|",
    ]

    for name, task in tasks.items():
        beside = found[0][name][ALONE].get("beside", [])
        best = max((peer["figures"][task.figure] for peer in beside), default=None)
        cells = [
            spread([of[name][how]["metrics"][task.figure] for of in found if how in of[name]])
            for how in (ALONE, TOGETHER)
        ]
        side = "" if best is None else f"{best:.1f}"
        lines.append(f"| {name} | {task.figure} | {side} | {' | '.join(cells)} |")

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
    every = tasks_of(Path(options.world))
    tasks = {name: every[name] for name in chosen(options.only, "--only", every)}
    check_writable(Path(options.output), "--output")

    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda seed: results_of(options, tasks, seed), seeds)
        found = list(progress(results, total=len(seeds), unit="seed", desc="tasks"))

    steps = [
        f"{options.pretrain_iters} steps of pretraining",
        f"{options.train_iters} of finetuning on a task",
    ]
    if together := options.steps_together(len(tasks)):
        steps.append(f"{together} on all at once")

    note = (
        f"{', '.join(steps)}, {options.batch_size} samples each, seeds {options.seeds};"
        " generated scenes"
    )
    text = f"{table(found, tasks)}\n\n{note}\n"
    write_text(Path(options.output) / "tasks.md", text)
    write_json(
        Path(options.output) / "tasks.json",
        {"results": found, "options": dataclasses.asdict(options), "versions": versions()},
    )
    print(text)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
