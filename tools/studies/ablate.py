"""Run the paper's ablation: measure what each part of the pretraining and of the model is worth.

For every variant and seed: pretrain, evaluate retrieval zero-shot, finetune for retrieval,
evaluate; with the same steps and samples for all. Finished runs are not repeated, so a stopped
study is resumable. Writes OUTPUT/ablation.json and OUTPUT/ablation.md.

    python tools/ablate.py --data-path sample_corpus/train --test-data-path sample_corpus/test \\
        --output ablation --language en
"""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

import megatron_interbert
from megatron_interbert.command_line import run_command
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import Flags, nearest, option
from megatron_interbert.data.manifest import HARD_NEGATIVES, MANIFEST
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import check_writable, write_json, write_text
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json, read_text
from megatron_interbert.weights.manifest import newest_checkpoint, versions

FIGURES = {
    "zero-shot t2i R@1": ("zero-shot", "t2i_R@1"),
    "zero-shot i2t R@1": ("zero-shot", "i2t_R@1"),
    "finetuned t2i R@1": ("finetuned", "t2i_R@1"),
    "finetuned i2t R@1": ("finetuned", "i2t_R@1"),
}


@dataclass
class Variant:
    """Hold one row of the table: its description, flags of its pretraining, and sizes that differ
    from the model's.

    In the first `shared_part` of its steps all layers of a stack are one; then they are untied.
    """

    what: str
    flags: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    shared_part: float = 0.0


def variants(sizes: ModelConfig) -> dict[str, Variant]:
    """Return all variants by name; tokens pass through the same depth in each."""
    joint = sizes.interaction_layers
    text = sizes.text_layers
    image = sizes.image_layers

    return {
        "full": Variant("everything"),
        "no-msm": Variant("without masked segments", ("--objectives", "mrm,itm")),
        "no-mrm": Variant("without masked regions", ("--objectives", "msm,itm")),
        "no-itm": Variant("without image-text matching", ("--objectives", "msm,mrm")),
        "no-hard-negatives": Variant("random negatives only", ("--hard-negatives", "0")),
        "no-interaction": Variant(
            "streams only, no interaction module",
            sizes=layers(0, text + joint, image + joint),
        ),
        "no-streams": Variant(
            "interaction module only, no streams", sizes=layers(joint + max(text, image), 0, 0)
        ),
    }


def layers(interaction: int, text: int, image: int) -> dict[str, int]:
    """Return the sizes of a model with so many layers."""
    return {"interaction_layers": interaction, "text_layers": text, "image_layers": image}


@dataclass
class Options(Flags):
    """Hold the flags of ablate."""

    GROUP: ClassVar[str] = "data"

    data_path: str = option("", "region store to pretrain and finetune on", required=True)
    test_data_path: str = option("", "region store of unseen images", required=True)
    output: str = option("", "folder for all runs and the table", required=True)
    language: str = option("", "use only captions with this language tag")
    model: str = option("sample", "preset or JSON file of sizes", group="model")
    only: str = option("", "variants, comma-separated; default: all", group="study")
    seeds: str = option("1,2,3", "seeds of each variant, comma-separated", group="study")
    train_iters: int = option(2000, "steps of each pretraining", least=1, group="optimisation")
    finetune_iters: int = option(300, "steps of each finetuning", least=1, group="optimisation")
    batch_size: int = option(64, "samples per step", least=1, group="optimisation")
    pretrain_flags: str = option(
        "--lr 2e-3 --lr-warmup-fraction 0.05 --adam-beta2 0.98 --no-msm-on-mismatched",
        "further flags of all pretrainings",
        group="optimisation",
    )
    finetune_flags: str = option(
        "--lr 1e-3 --lr-warmup-fraction 0.05 --ema-decay 0.99",
        "further flags of all finetunings",
        group="optimisation",
    )
    jobs: int = option(os.cpu_count() or 1, "runs at a time, one core each", least=1, group="study")


class Run:
    """Train and evaluate one variant with one seed, in a folder of its own."""

    def __init__(self, name: str, variant: Variant, seed: int, options: Options) -> None:
        self.name = name
        self.variant = variant
        self.seed = seed
        self.options = options
        self.folder = Path(options.output) / name / f"seed-{seed}"

    def results(self) -> dict[str, dict[str, float]]:
        """Return the figures of each protocol, running the stages that are missing."""
        pretrained = self._pretrain()
        tuned = self._finetune(pretrained)

        return {
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
        shared = round(self.options.train_iters * self.variant.shared_part)

        if shared:
            first = self.folder / "shared"
            self._train(first, shared, "pretrain", *flags, "--share-layers")
            flags = (*flags, "--init-from", first)
        self._train(save, self.options.train_iters - shared, "pretrain", *flags)

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

    def _train(self, save: Path, iterations: int, entry: str, *flags: object) -> None:
        done = newest_checkpoint(save) if save.is_dir() else None
        self._same(save, flags_of(save), json.dumps([entry, *map(str, flags), str(iterations)]))
        if done is None or done.name != f"global_step{iterations}":
            self._call(
                entry, *flags, "--seed", self.seed, "--train-iters", iterations, "--save", save
            )

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
            last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
            raise TrainingStopped(
                f"{self.folder}: {shlex.join(command)} ended with code {ended.returncode}:"
                f" {''.join(last)}"
            )


def flags_of(place: Path) -> Path:
    """Return the file that records the flags of a stage."""
    return place.with_name(f"{place.name}.flags.json")


def table(
    found: dict[str, list[dict[str, dict[str, float]]]], all_variants: dict[str, Variant]
) -> str:
    """Return a Markdown table of mean and spread (standard deviation over seeds) of each figure,
    with the change against `full` in the last column.
    """
    lines = [
        "| variant | " + " | ".join(FIGURES) + " | change, finetuned t2i |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    full = [r["finetuned"]["t2i_R@1"] for r in found.get("full", [])]

    for name, results in found.items():
        cells = [
            _mean([r[protocol][metric] for r in results]) for protocol, metric in FIGURES.values()
        ]
        mine = statistics.mean(r["finetuned"]["t2i_R@1"] for r in results)
        change = f"{mine - statistics.mean(full):+.1f}" if full and name != "full" else ""
        lines.append(f"| {all_variants[name].what} | {' | '.join(cells)} | {change} |")

    return "\n".join(lines)


def figures_of(result: Path) -> dict[str, float]:
    """Read the figures of an evaluation; raises UsageError if one for the table is missing."""
    metrics = read_json(result, "--output").get("metrics")
    needed = {figure for _, figure in FIGURES.values()}
    if not isinstance(metrics, dict) or not all(
        type(metrics.get(name)) in (int, float) for name in needed
    ):
        raise UsageError(
            f"{result}: expected the figures {', '.join(sorted(needed))}; remove the file, and the"
            " same command writes it again"
        )

    return metrics


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def run(options: Options) -> None:
    """Check the options, run what is missing and write the table."""
    study(options, variants(load_model_config(options.model)), "ablation")


def study(options: Options, every: dict[str, Variant], name: str) -> None:
    """Compare the variants in --only, or all of `every`; the table is OUTPUT/`name`.md."""
    seeds = read_seeds(options.seeds)
    chosen = chosen_variants(options, every)
    check_stores(options, chosen)
    check_further_flags(options)
    check_writable(Path(options.output), "--output")

    runs = [Run(one, every[one], seed, options) for seed in seeds for one in chosen]
    found = run_all(runs, options.jobs)
    write_report(options, found, every, name)


def read_seeds(given: str) -> list[int]:
    """Read --seeds; raises UsageError if one is not a whole number."""
    try:
        return [int(seed) for seed in given.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds is '{given}', expected whole numbers separated by commas"
        ) from None


def chosen_variants(options: Options, every: dict[str, Variant]) -> list[str]:
    """Return the names in --only, or all; raises UsageError for an unknown name."""
    chosen = [name for name in options.only.split(",") if name] or list(every)
    for name in chosen:
        if name not in every:
            raise UsageError(
                f"--only: unknown variant '{name}'{nearest(name, every)}, expected some of"
                f" {', '.join(every)}"
            )

    return chosen


def check_stores(options: Options, chosen: list[str]) -> None:
    """Raise UsageError unless both stores exist and hold what the chosen variants need."""
    for name in ("data_path", "test_data_path"):
        if not (Path(getattr(options, name)) / MANIFEST).is_file():
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: no region store there"
            )

    if "no-hard-negatives" in chosen and not (Path(options.data_path) / HARD_NEGATIVES).is_file():
        raise UsageError(
            f"{options.data_path}: no {HARD_NEGATIVES}, so leaving hard negatives out changes"
            " nothing; make it with interbert mine-negatives, or leave the variant out by --only"
        )


def check_further_flags(options: Options) -> None:
    """Raise UsageError if the flags to pass on cannot be split as a shell would."""
    for name in ("pretrain_flags", "finetune_flags"):
        try:
            shlex.split(getattr(options, name))
        except ValueError as error:
            raise UsageError(
                f"--{name.replace('_', '-')}: {error}; expected flags as in a shell"
            ) from None


def run_all(runs: list[Run], jobs: int) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Run all, `jobs` at a time; return the results of each variant in the order of its seeds."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {one.name: [] for one in runs}

    with (
        ThreadPoolExecutor(jobs) as pool,
        progress(total=len(runs), unit="run", desc="ablation") as bar,
    ):
        futures = [pool.submit(one.results) for one in runs]
        try:
            for one, future in zip(runs, futures, strict=True):
                result = future.result()
                found[one.name].append(result)
                bar.update()
                bar.write(f"{one.name}, seed {one.seed}: {json.dumps(result['finetuned'])}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    return found


def write_report(
    options: Options,
    found: dict[str, list[dict[str, dict[str, float]]]],
    every: dict[str, Variant],
    name: str,
) -> None:
    """Write the figures and the table as files of a name, and print the table."""
    manifest = read_json(Path(options.test_data_path) / MANIFEST, "--test-data-path")
    scenes = "; generated scenes" if manifest.get("generated") else ""
    note = (
        f"{options.train_iters} + {options.finetune_iters} steps of {options.batch_size}, seeds"
        f" {options.seeds}{scenes}"
    )
    text = f"{table(found, every)}\n\n{note}\n"

    write_json(
        Path(options.output) / f"{name}.json",
        {"results": found, "options": dataclasses.asdict(options), "versions": versions()},
    )
    write_text(Path(options.output) / f"{name}.md", text)
    print(text)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
