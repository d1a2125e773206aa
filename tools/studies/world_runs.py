"""Pretrain on a generated world, finetune on its tasks and evaluate them, for one seed."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_interbert.config.options import Flags, nearest, option
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from tools.studies.stages import Stages, Written
from tools.studies.world_tasks import WorldTask

Result = dict[str, Any]  # what result.json holds


@dataclass
class WorldOptions(Flags):
    """Hold the flags that studies of a generated world share."""

    GROUP: ClassVar[str] = "data"

    world: str = option("", "folder tasks/ of a generated world", required=True)
    output: str = option("", "folder for all runs and the table", required=True)
    model: str = option("sample", "preset or JSON file of sizes", group="model")
    seeds: str = option("1,2,3", "seeds, comma-separated", group="study")
    pretrain_iters: int = option(6000, "steps of pretraining", least=1, group="optimisation")
    train_iters: int = option(2000, "steps of finetuning on a task", least=1, group="optimisation")
    batch_size: int = option(64, "samples per step", least=1, group="optimisation")
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
    jobs: int = option(1, "runs at a time, one core each", least=1, group="study")

    @property
    def train_path(self) -> str:
        """Return the region store of the training scenes."""
        return f"{self.world}/train"

    def check(self) -> None:
        """Raise UsageError if there is no generated world."""
        super().check()
        if not (Path(self.train_path) / MANIFEST).is_file():
            raise UsageError(f"--world {self.world}: no region store train/ there")


class WorldRun:
    """Train and evaluate with one seed, in a folder of its own."""

    def __init__(self, options: WorldOptions, folder: Path, seed: int) -> None:
        self.options = options
        self.folder = folder
        self.seed = seed
        self.stages = Stages(folder)

    def pretrain(self, model: str, *flags: str) -> Path:
        """Pretrain a model with further flags; return the run's folder."""
        options = self.options
        data = ("--model", model, "--data-path", options.train_path)
        command = ("pretrain", *data, *self._usual(), *shlex.split(options.pretrain_flags), *flags)

        return self.stages.train(
            self.folder / "pretrained", options.pretrain_iters, *command, seed=self.seed
        )

    def finetune(
        self, name: str, command: str, start: Path, flags: Mapping[str, object], steps: int
    ) -> Path:
        """Finetune from pretrained weights for so many steps."""
        further = shlex.split(self.options.finetune_flags)
        words = (*words_of(flags), *self._usual(), *further)

        return self.stages.train(
            self.folder / name,
            steps,
            *("finetune", command, "--init-from", start, *words),
            seed=self.seed,
        )

    def finetune_together(
        self, name: str, tasks: Mapping[str, WorldTask], start: Path, steps: int
    ) -> Path:
        """Finetune on several tasks in one run, for so many steps in all."""
        file = self.folder / f"{name}.yaml"
        flags = {task_name: task.training() for task_name, task in tasks.items()}
        write_text(file, yaml.safe_dump(flags, sort_keys=False))
        given = {"task-flags": Written(file)}

        return self.finetune(name, "multitask", start, given, steps)

    def evaluate(self, name: str, task: WorldTask, run: Path) -> Result:
        """Evaluate a finetuned run on unseen scenes."""
        folder = run / "evaluation" / name
        return self.stages.evaluate(
            folder, task.command, "--load", run, *words_of(task.evaluation())
        )

    def _usual(self) -> tuple[object, ...]:
        size = self.options.batch_size
        batch = ("--micro-batch-size", size, "--global-batch-size", size)
        return (*batch, "--num-workers", 0, "--log-interval", 100)


def words_of(flags: Mapping[str, object]) -> tuple[object, ...]:
    """Return flags as words of a command line."""
    return tuple(word for name, value in flags.items() for word in (f"--{name}", value))


def chosen(given: str, flag: str, every: dict[str, Any]) -> list[str]:
    """Return the names in a flag, or all; raises UsageError for unknown ones."""
    names = [name.strip() for name in given.split(",") if name.strip()] or list(every)
    for name in names:
        if name not in every:
            raise UsageError(
                f"{flag}: unknown '{name}'{nearest(name, every)}, expected some of"
                f" {', '.join(every)}"
            )

    return names
