"""Measure on a generated world what parts of the pretraining and of the model are worth.

For every variant and seed: pretrain, evaluate retrieval zero-shot, finetune on each task, evaluate;
with the same steps and samples for all. Two tasks share a run and need words and regions; the
others are answered by one side alone: rte (pairs of sentences) and looks (the same few words about
every scene). Finished runs are not repeated, so a stopped study is resumable. Writes
OUTPUT/ablation.json and OUTPUT/ablation.md, with the change of each figure against the whole and
how many seeds share its sign.

    interbert make-sample --output world --tasks && interbert mine-negatives world/tasks/train
    python tools/ablate_tasks.py --world world/tasks --output study
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import option
from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_writable, write_json, write_text
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.progress import progress
from megatron_interbert.weights.manifest import versions
from tools.studies.ablate import variants
from tools.studies.compare_tasks import spread
from tools.studies.options import read_seeds
from tools.studies.stages import Written
from tools.studies.variant_run import Variant
from tools.studies.world_runs import WorldOptions, WorldRun, chosen
from tools.studies.world_tasks import WorldTask, one_sided, tasks_of

FULL = "full"
RETRIEVAL = "t2i R@1"
Figures = dict[str, float]  # of a run, by task


@dataclass
class Options(WorldOptions):
    """Hold the flags of the study."""

    only: str = option(
        "full,no-msm,no-hard-negatives,no-streams", "variants, comma-separated", group="study"
    )
    tasks: str = option(
        "refcoco+vqa,rte,looks",
        "tasks to finetune on, comma-separated; with + between those that share a run",
        group="study",
    )
    images: int = option(
        300, "unseen scenes among which captions find theirs", least=2, group="study"
    )


class Ablation:
    """Run the variants of a study."""

    def __init__(self, options: Options) -> None:
        world = Path(options.world)
        every = {**tasks_of(world), **one_sided(world)}
        self.options = options
        self.sizes = load_model_config(options.model)
        self.every = variants(self.sizes)
        self.names = chosen(options.only, "--only", self.every)
        self.groups = [
            {name: every[name] for name in chosen(group.replace("+", ","), "--tasks", every)}
            for group in filter(None, map(str.strip, options.tasks.split(",")))
        ]
        names = [name for group in self.groups for name in group]
        again = next((name for name in names if names.count(name) > 1), "")
        if again or not names:
            raise UsageError(
                f"--tasks {options.tasks}: {again} occurs twice" if again else "--tasks is empty"
            )

        self.images = Path(options.output) / "images.txt"
        self.scenes = 0

        if "no-hard-negatives" in self.names:
            check_mined(Path(options.train_path))

    def prepare(self) -> None:
        """Write the names of the scenes of retrieval."""
        check_writable(Path(self.options.output), "--output")
        store = RegionStore(f"{self.options.world}/test")
        self.scenes = min(self.options.images, store.num_images)
        self.images.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.images, "".join(f"{store.image_id(n)}\n" for n in range(self.scenes)))

    def figures(self, name: str, seed: int) -> Figures:
        """Return the figures of a variant for a seed, running what is missing."""
        run = WorldRun(self.options, Path(self.options.output) / name / f"seed-{seed}", seed)
        variant = self.every[name]
        start = run.pretrain(self._model(variant, run), *variant.flags)
        data = ("--data-path", f"{self.options.world}/test", "--images", Written(self.images))
        words = ("retrieval", "--load", start, "--zero-shot", *data)
        found = run.stages.evaluate(start / "evaluation" / "retrieval", *words)
        figures = {RETRIEVAL: found["metrics"]["t2i_R@1"]}

        for tasks in self.groups:
            tuned = finetuned(run, tasks, start)
            for task_name, task in tasks.items():
                result = run.evaluate(task_name, task, tuned)
                figures[task_name] = result["metrics"][task.figure]

        return figures

    def _model(self, variant: Variant, run: WorldRun) -> str:
        sizes = dataclasses.replace(self.sizes, **variant.sizes)
        path = run.folder / "model.json"
        text = json.dumps(dataclasses.asdict(sizes), indent=1)
        run.stages.same(run.folder / "pretrained", path, text)

        return str(path)


def finetuned(run: WorldRun, tasks: Mapping[str, WorldTask], start: Path) -> Path:
    """Finetune on one task, or on several in one run, for --train-iters steps of each."""
    steps = len(tasks) * run.options.train_iters
    if len(tasks) > 1:
        return run.finetune_together("+".join(tasks), tasks, start, steps)

    ((name, task),) = tasks.items()

    return run.finetune(name, task.command, start, task.training(), steps)


def check_mined(store: Path) -> None:
    """Raise UsageError if a store has no mined negatives to leave out."""
    if not (store / HARD_NEGATIVES).is_file():
        raise UsageError(
            f"{store}: no {HARD_NEGATIVES}, so leaving hard negatives out changes nothing; make it"
            " with interbert mine-negatives, or leave the variant out by --only"
        )


def table(found: dict[str, list[Figures]], every: dict[str, Variant]) -> str:
    """Return a Markdown table: mean and standard deviation of each figure over seeds and, for parts
    left out, the change against the whole with the seeds that share its sign.
    """
    columns = list(next(iter(found.values()))[0])
    lines = [
        "| variant | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]

    for name, runs in found.items():
        cells = []
        for column in columns:
            cell = spread([run[column] for run in runs])
            if name != FULL and FULL in found:
                pairs = zip(runs, found[FULL], strict=True)
                cell += f" ({change([mine[column] - full[column] for mine, full in pairs])})"
            cells.append(cell)
        lines.append(f"| {every[name].what} | {' | '.join(cells)} |")

    return "\n".join(lines)


def change(differences: list[float]) -> str:
    """Return `-1.2, 3 of 3`: the mean difference, and how many of them have its sign."""
    mean = statistics.mean(differences)
    alike = sum(difference * mean > 0 for difference in differences)
    return f"{mean:+.1f}, {alike} of {len(differences)}"


def run(options: Options) -> None:
    """Run what is missing and write the table."""
    seeds = read_seeds(options.seeds)
    ablation = Ablation(options)
    ablation.prepare()
    wanted = [(name, seed) for seed in seeds for name in ablation.names]

    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda pair: ablation.figures(*pair), wanted)
        figures = list(progress(results, total=len(wanted), unit="run", desc="ablation"))

    found: dict[str, list[Figures]] = {name: [] for name in ablation.names}
    for (name, _), values in zip(wanted, figures, strict=True):
        found[name].append(values)

    note = (
        f"{options.pretrain_iters} steps of pretraining, {options.train_iters} of finetuning on a"
        f" task, {options.batch_size} samples each, seeds {options.seeds}; {RETRIEVAL} zero-shot"
        f" among {ablation.scenes} scenes; in brackets the change against everything, and how many"
        " seeds share its sign; generated scenes"
    )
    text = f"{table(found, ablation.every)}\n\n{note}\n"
    write_text(Path(options.output) / "ablation.md", text)
    write_json(
        Path(options.output) / "ablation.json",
        {"results": found, "options": dataclasses.asdict(options), "versions": versions()},
    )
    print(text)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
