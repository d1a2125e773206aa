"""Declare the flags for finetuning on several tasks, and read those of each task."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_interbert.config.options import ABOVE_0, FREE, SAME, nearest, redefault, setting
from megatron_interbert.config.yaml_file import read_mapping
from megatron_interbert.data.loader import most_batches_ahead
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import FinetuneConfig
from megatron_interbert.tasks.multitask.schedule import LAG
from megatron_interbert.tasks.task_flags import config_of

SCHEDULES = ("round-robin", "size", "temperature")


@dataclass
class MultitaskConfig(FinetuneConfig):
    """Finetune on several tasks at once (12-in-1): one trunk, a head for each, one task a step."""

    data_path: str = setting(
        "",
        "region stores for tasks that name none, comma-separated",
        FREE,
        may_differ=True,
        names_store=True,
    )
    task_flags: str = setting("", "YAML with the flags of each task, by the task's name", FREE)
    tasks: str = setting("", "tasks to train on, comma-separated; default: all of the file", SAME)
    schedule: str = setting(
        "round-robin",
        "which task a step trains: each in turn; or drawn by the number of samples, or by its root"
        " (--temperature)",
        SAME,
        SCHEDULES,
        group="optimisation",
    )
    temperature: float = setting(
        2.0,
        "a task is drawn by its number of samples to the power of 1 / this",
        SAME,
        least=ABOVE_0,
        group="optimisation",
    )
    loss_weights: str = setting(
        "",
        "factors of the tasks' losses, such as vqa:1,nlvr2:0.5; default: 1",
        SAME,
        group="optimisation",
    )
    stop_and_go: bool = setting(
        False,
        "train a task whose figure has stopped rising only every fourth round, until it falls"
        " (12-in-1); needs --schedule round-robin",
        SAME,
        group="optimisation",
    )
    exclude_images: str = setting(
        "",
        "files with names of images that no task may train on (a name on each line, .json, .npy),"
        " comma-separated; coco:FILE if its numbers are COCO's; images of the tasks' validation"
        " files are excluded in any case",
        FREE,
    )
    image_data: str = setting(
        "",
        "image_data.json of Visual Genome, which says which of its images are COCO's: those are"
        " excluded under both names",
        FREE,
    )
    epochs: float = redefault(
        FinetuneConfig,
        "epochs",
        20.0,
        "passes over the samples of the largest task, with as many steps for every other task;"
        " over the samples of all tasks if --schedule draws them",
    )
    global_batch_size: int = redefault(
        FinetuneConfig,
        "global_batch_size",
        64,
        "samples per optimizer step over all ranks, of one task",
        resume=SAME,
    )
    lr: float = redefault(FinetuneConfig, "lr", 2e-5)

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if self.stop_and_go and self.schedule != "round-robin":
            raise UsageError(f"--stop-and-go needs --schedule round-robin, not {self.schedule}")
        if self.stop_and_go and most_batches_ahead(self.num_workers) > LAG:
            most = max(n for n in range(LAG) if most_batches_ahead(n) <= LAG)
            raise UsageError(f"--stop-and-go: --num-workers may be {most} at most")


def configs_of(
    config: MultitaskConfig, known: Mapping[str, type[FinetuneConfig]]
) -> dict[str, FinetuneConfig]:
    """Return the settings of each task: its own from --task-flags, the others from the run.

    Raises UsageError that names the file and the key for a task or a flag that is not known, or a
    flag that only the run can have.
    """
    if not config.task_flags:
        raise UsageError("--task-flags is missing; give a YAML with the flags of each task")

    given = read_mapping(config.task_flags, "--task-flags")
    names = [n.strip() for n in config.tasks.split(",") if n.strip()] or list(given)
    found = {}

    for name in names:
        if name not in known:
            raise UsageError(
                f"{config.task_flags}: no task '{name}'{nearest(name, known)}, expected some of"
                f" {', '.join(known)}"
            )
        if name not in given:
            raise UsageError(f"--tasks {name}: {config.task_flags} has no flags for it")
        found[name] = config_of(config, config.task_flags, name, known[name], given[name])

    if len(found) < 2:
        raise UsageError(
            f"--task-flags {config.task_flags}: tasks to train on: {', '.join(found) or 'none'};"
            " expected two or more (finetune TASK trains one)"
        )

    return found
