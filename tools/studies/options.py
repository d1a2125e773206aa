"""Define the flags of a study and check them."""

import os
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_interbert.config.options import Flags, nearest, option
from megatron_interbert.data.manifest import HARD_NEGATIVES, MANIFEST
from megatron_interbert.errors import UsageError


@dataclass
class Options(Flags):
    """Hold the flags of a study."""

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


def read_seeds(given: str) -> list[int]:
    """Read --seeds; raises UsageError if one is not a whole number."""
    try:
        return [int(seed) for seed in given.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds is '{given}', expected whole numbers separated by commas"
        ) from None


def chosen_variants(options: Options, every: Collection[str]) -> list[str]:
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
