"""Train and evaluate one variant of a study with one seed; what is finished is not repeated."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import megatron_interbert
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import write_text
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.reading import read_json, read_text
from megatron_interbert.weights.manifest import newest_checkpoint
from tools.studies.options import Options
from tools.studies.pretraining_figures import pretraining_figures

Results = dict[str, dict[str, float]]  # figures of each stage of a run
SECOND_SEED = 1000  # added to the seed of a pretraining's second run
NEEDED = ("t2i_R@1", "i2t_R@1")


@dataclass
class Variant:
    """Hold one row of the table: its description, flags of its pretraining, and sizes that differ
    from the model's.

    The pretraining may be two runs, each with its own schedule and order of samples: the first
    takes `first_part` of the steps, with `first_flags` too; the second starts from its weights.
    """

    what: str
    flags: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    first_part: float = 0.0
    first_flags: tuple[str, ...] = ()


class Run:
    """Train and evaluate one variant with one seed, in a folder of its own."""

    def __init__(self, name: str, variant: Variant, seed: int, options: Options) -> None:
        self.name = name
        self.variant = variant
        self.seed = seed
        self.options = options
        self.folder = Path(options.output) / name / f"seed-{seed}"

    def results(self) -> Results:
        """Return the figures of each stage, running those that are missing."""
        pretrained = self._pretrain()
        tuned = self._finetune(pretrained)

        return {
            "pretraining": pretraining_figures(pretrained),
            "zero-shot": self._evaluate(pretrained, "--zero-shot"),
            "finetuned": self._evaluate(tuned),
        }

    def _pretrain(self) -> Path:
        save = self.folder / "pretrained"
        flags = (
            *("--model", self._model(), "--data-path", self.options.data_path),
            *self._common_flags(),
            *self.variant.flags,
            *shlex.split(self.options.pretrain_flags),
        )
        steps = self.options.train_iters
        first_steps = round(steps * self.variant.first_part)

        if not first_steps:
            self._train(save, steps, "pretrain", *flags)
            return save

        first = self.folder / "first"
        self._train(first, first_steps, "pretrain", *flags, *self.variant.first_flags)
        again = ("--init-from", first)
        order = SECOND_SEED + self.seed
        self._train(save, steps - first_steps, "pretrain", *flags, *again, seed=order)

        return save

    def _finetune(self, pretrained: Path) -> Path:
        save = self.folder / "finetuned"
        flags = shlex.split(self.options.finetune_flags)
        start = ("--init-from", pretrained, "--max-regions", 36)
        data = ("--data-path", self.options.data_path)
        batch = ("--global-batch-size", self.options.batch_size)

        self._train(
            save,
            self.options.finetune_iters,
            "finetune",
            "retrieval",
            *start,
            *data,
            *self._common_flags(),
            *batch,
            *flags,
        )

        return save

    def _common_flags(self) -> tuple[object, ...]:
        language = ("--language", self.options.language)
        batch = ("--micro-batch-size", self.options.batch_size)
        return (*language, *batch, "--num-workers", 0, "--log-interval", 100)

    def _evaluate(self, run: Path, *protocol: str) -> dict[str, float]:
        options = self.options
        folder = run / "result"
        result = folder / "result.json"
        self._same(folder, flags_of(folder), json.dumps([options.test_data_path, options.language]))

        if not result.is_file():
            data = ("--data-path", options.test_data_path, "--language", options.language)
            self._call("evaluate", "retrieval", "--load", run, *data, *protocol, "--output", folder)

        return figures_of(result)

    def _model(self) -> str:
        sizes = load_model_config(self.options.model)
        sizes = dataclasses.replace(sizes, **self.variant.sizes)
        path = self.folder / "model.json"
        self._same(
            self.folder / "pretrained", path, json.dumps(dataclasses.asdict(sizes), indent=1)
        )

        return str(path)

    def _train(
        self, save: Path, iterations: int, entry: str, *flags: object, seed: int | None = None
    ) -> None:
        done = newest_checkpoint(save) if save.is_dir() else None
        self._same(save, flags_of(save), json.dumps([entry, *map(str, flags), str(iterations)]))
        if done is None or done.name != f"global_step{iterations}":
            seed = self.seed if seed is None else seed
            self._call(entry, *flags, "--seed", seed, "--train-iters", iterations, "--save", save)

    def _same(self, place: Path, record: Path, text: str) -> None:
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

    def _call(self, entry: str, *flags: object) -> None:
        command = [sys.executable, "-m", f"megatron_interbert.{entry}", *map(str, flags)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
        }
        root = Path(megatron_interbert.__file__).resolve().parents[1]
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(root), os.environ.get("PYTHONPATH", "")])
        )
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


def figures_of(result: Path) -> dict[str, float]:
    """Read the figures of an evaluation; raises UsageError if one of NEEDED is missing."""
    metrics = read_json(result, "--output").get("metrics")
    if not isinstance(metrics, dict) or not all(
        type(metrics.get(name)) in (int, float) for name in NEEDED
    ):
        raise UsageError(
            f"{result}: expected the figures {', '.join(NEEDED)}; remove the file, and the"
            " same command writes it again"
        )

    return metrics
