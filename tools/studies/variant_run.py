"""Train and evaluate one variant of a study with one seed; what is finished is not repeated."""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.reading import read_json
from tools.studies.options import Options
from tools.studies.pretraining_figures import pretraining_figures
from tools.studies.stages import Stages

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
        self.stages = Stages(self.folder)

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

        train = self.stages.train
        if not first_steps:
            return train(save, steps, "pretrain", *flags, seed=self.seed)

        first = self.folder / "first"
        more = self.variant.first_flags
        train(first, first_steps, "pretrain", *flags, *more, seed=self.seed)
        again = ("--init-from", first)
        order = SECOND_SEED + self.seed

        return train(save, steps - first_steps, "pretrain", *flags, *again, seed=order)

    def _finetune(self, pretrained: Path) -> Path:
        save = self.folder / "finetuned"
        flags = shlex.split(self.options.finetune_flags)
        start = ("--init-from", pretrained, "--max-regions", 36)
        data = ("--data-path", self.options.data_path)
        batch = ("--global-batch-size", self.options.batch_size)

        return self.stages.train(
            save,
            self.options.finetune_iters,
            *("finetune", "retrieval"),
            *start,
            *data,
            *self._common_flags(),
            *batch,
            *flags,
            seed=self.seed,
        )

    def _common_flags(self) -> tuple[object, ...]:
        language = ("--language", self.options.language)
        batch = ("--micro-batch-size", self.options.batch_size)
        return (*language, *batch, "--num-workers", 0, "--log-interval", 100)

    def _evaluate(self, run: Path, *protocol: str) -> dict[str, float]:
        options = self.options
        folder = run / "result"
        data = ("--data-path", options.test_data_path, "--language", options.language)
        self.stages.evaluate(folder, "retrieval", "--load", run, *data, *protocol)

        return figures_of(folder / "result.json")

    def _model(self) -> str:
        sizes = load_model_config(self.options.model)
        sizes = dataclasses.replace(sizes, **self.variant.sizes)
        path = self.folder / "model.json"
        self.stages.same(
            self.folder / "pretrained", path, json.dumps(dataclasses.asdict(sizes), indent=1)
        )

        return str(path)


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
