"""What training runs are told, and the arithmetic of their batches."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_interbert.config.model import FLOAT8_MULTIPLE, ModelConfig
from megatron_interbert.config.options import AUTO, FREE, SAME, rows, setting
from megatron_interbert.config.settings import (
    CheckpointSettings,
    DataSettings,
    LoggingSettings,
    ModelSettings,
    OptimisationSettings,
    ParallelismSettings,
)
from megatron_interbert.errors import UsageError


@dataclass
class TrainConfig(
    DataSettings,
    ModelSettings,
    OptimisationSettings,
    ParallelismSettings,
    CheckpointSettings,
    LoggingSettings,
):
    """What every training run is told, whatever it trains on."""

    GROUP: ClassVar[str] = "more"

    exit_interval: int = setting(
        0,
        "save and end after a step that is a multiple of this; the same command resumes; 0: never",
        FREE,
        least=0,
    )
    exit_duration_in_mins: float = setting(
        0.0, "save and end after so many minutes; the same command resumes; 0: never", FREE, least=0
    )
    hang_timeout: int = setting(
        300,
        "end the run when no rank moves for so many seconds, or 10 times what is usual; 0: never",
        FREE,
        least=0,
    )
    print_launch: bool = setting(False, "show which rank would run where, and end", FREE)

    # a run sets its own, when it knows how many ranks there are
    data_parallel_size: ClassVar[int] = 1

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches per optimizer step and rank.

        UsageError when the batch sizes do not divide.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        batch = self.global_batch_size or per_pass
        if batch % per_pass:
            raise UsageError(
                f"{self.told('global_batch_size')} is not a multiple of"
                f" {self.told('micro_batch_size')} x data-parallel size {data_parallel_size}"
                f" = {per_pass}; change one of them"
            )

        return batch // per_pass

    def fit_batches(self, data_parallel_size: int) -> None:
        """Fit batch sizes that nobody has said to the number of data-parallel ranks."""
        ranks = data_parallel_size
        told = self.micro_batch_size != AUTO and not self.is_default("micro_batch_size")
        least = ranks * self.micro_batch_size if told else ranks

        if self.global_batch_size % least and self.is_default("global_batch_size"):
            whole = max(self.global_batch_size // least, 1) * least
            reason = f" with {self.told('micro_batch_size')}" if told else ""
            plural = "s share" if ranks > 1 else " takes"
            self.fit("global_batch_size", whole, f"{ranks} data-parallel rank{plural} it{reason}")

        if self.micro_batch_size == AUTO or told:
            return

        share = self.global_batch_size // ranks
        if share and self.global_batch_size % ranks == 0:
            fits = max(n for n in range(1, min(self.micro_batch_size, share) + 1) if share % n == 0)
            reason = f"a rank's share of {self.told('global_batch_size')} is {share}"
            self.fit("micro_batch_size", fits, reason)

    def fit_partitions(self, samples: int) -> int:
        """Settle in how many partitions so many `samples` are cut, and give that number.

        As given; a default becomes fewer where there are too few samples, in steps that keep it
        divisible by the data-parallel size and the same for 1, 2, 4, .. ranks.
        """
        ranks = self.data_parallel_size
        fit = self.data_partitions <= samples and self.data_partitions % ranks == 0
        if self.is_default("data_partitions") and samples >= ranks and not fit:
            times = min(self.data_partitions, samples) // ranks
            fits = ranks << max(times.bit_length() - 1, 0)
            reason = f"{samples} samples, {ranks} data-parallel rank{'s' * (ranks > 1)}"
            self.fit("data_partitions", fits, reason)

        return self.data_partitions

    def fit_zero_stage(self, processes: int) -> None:
        """Take ZeRO stage 0 for one process in fp32, which shares nothing: it is fastest there."""
        alone = processes == 1 and not (self.fp16 or self.bf16)
        if alone and self.is_default("zero_stage") and not self.deepspeed_config:
            self.zero_stage = 0

    def global_batch(self, data_parallel_size: int) -> int:
        """Give samples per optimizer step over all ranks."""
        return (
            self.micro_batch_size * data_parallel_size * self.accumulation_steps(data_parallel_size)
        )

    def minutes_between_saves(self) -> float:
        """Minutes after which a checkpoint is due; 0 where only steps count."""
        by_steps = "save_interval" in self.given and "save_interval_in_mins" not in self.given
        return 0.0 if by_steps else self.save_interval_in_mins

    def milestones(self) -> list[float]:
        """Give the shares of --lr-milestones; UsageError unless they rise between 0 and 1."""
        try:
            shares = [float(part) for part in self.lr_milestones.split(",") if part]
        except ValueError:
            shares = [2.0]

        if shares != sorted(shares) or not all(0 < share < 1 for share in shares):
            raise UsageError(
                f"--lr-milestones is '{self.lr_milestones}', expected rising shares of the run such"
                " as 0.6,0.8"
            )

        return shares

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if self.fp16 and self.bf16:
            raise UsageError("--fp16 and --bf16 exclude each other; give one")
        if (self.fp16 or self.bf16) and self.zero_stage == 0:
            raise UsageError(
                f"--{'fp16' if self.fp16 else 'bf16'} needs --zero-stage 1 or higher: DeepSpeed's"
                " stage 0 takes one optimizer step too many in half precision, and its gradient"
                " norm is wrong there under tensor parallelism"
            )

        if self.deterministic and self.micro_batch_size == AUTO:
            raise UsageError(
                "--deterministic and --micro-batch-size auto: a trial does not choose the same"
                " every time; give a number"
            )

        self.milestones()

    def check_float8(self, sizes: ModelConfig) -> None:
        """Raise UsageError where --fp8 is given and cannot be: bf16 may be set by a DeepSpeed JSON,
        `sizes` by the data.
        """
        if not self.fp8:
            return
        if not self.bf16:
            raise UsageError("--fp8 needs --bf16: all but the layers' products is computed in it")
        for name in ("hidden_size", "ffn_hidden_size"):
            if getattr(sizes, name) % (FLOAT8_MULTIPLE * self.tensor_model_parallel_size):
                raise UsageError(
                    f"--fp8: {name} {getattr(sizes, name)} of the model is no multiple of"
                    f" {FLOAT8_MULTIPLE} on each of {self.tensor_model_parallel_size}"
                    " tensor-parallel ranks; leave it out or choose other sizes"
                )


@dataclass
class RunConfig(TrainConfig):
    """A pretraining run."""

    GROUP: ClassVar[str] = "data"

    data_path: str = setting(
        "sample_corpus/train",
        "region store to train on (a folder with manifest.json), or several with commas between"
        " them",
        FREE,
        may_differ=True,
        names_store=True,
    )
    data_epochs: str = setting(
        "", "passes over each of several stores in one epoch, e.g. 1,1,2.5; default: one each", SAME
    )
    data_weights: str = setting(
        "",
        "instead of --data-epochs: shares of an epoch's samples for each store, e.g. 0.7,0.2,0.1",
        SAME,
    )
    valid_data_path: str = setting(
        "",
        "region store for --eval-interval; none: no evaluation",
        FREE,
        may_differ=True,
        names_store=True,
    )
    language: str = setting(
        "", "train only on captions of this language tag (en, zh); default: all", SAME
    )
    masking: str = setting(
        "paper", "rules of the paper or of the official code", SAME, ("paper", "official")
    )
    msm_on_mismatched: bool = setting(
        True, "also predict masked words of mismatched captions", SAME
    )
    hard_negatives: float = setting(
        0.2,
        "share of the mismatched captions drawn from hard_negatives.npy, when present",
        SAME,
        least=0,
        most=1,
    )
    segmenter: str = setting(
        "characters",
        "what a Chinese word is for masking: each character, or the words of jieba",
        SAME,
        ("characters", "jieba"),
    )
    balance_tokens: bool = setting(
        True, "samples of like length meet, so that ranks get nearly equal numbers of tokens", SAME
    )
    objectives: str = setting(
        "msm,mrm,itm",
        "comma-separated losses to train on (for ablations)",
        SAME,
        group="optimisation",
    )
    eval_iters: int = setting(10, "batches per evaluation", FREE, least=1, group="logging")

    def stores(self) -> list[str]:
        """Give the region stores of --data-path."""
        return split_paths(self.data_path)

    def objective_names(self) -> tuple[str, ...]:
        """Give the losses to train on; UsageError for a name that is none of msm, mrm, itm."""
        names = tuple(name for name in self.objectives.split(",") if name)
        for name in names:
            if name not in ("msm", "mrm", "itm"):
                raise UsageError(f"--objectives: unknown '{name}', expected some of msm,mrm,itm")

        return names

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()

        if self.data_epochs and self.data_weights:
            raise UsageError(
                "--data-epochs and --data-weights say the same thing in two ways; give one"
            )

        if self.eval_interval and not self.valid_data_path:
            raise UsageError(
                "--eval-interval needs --valid-data-path, the region store to evaluate on"
            )

        self.objective_names()


def paths_of_stores(config: Any) -> list[str]:
    """List the paths that a configuration gives for region stores."""
    given = (getattr(config, name) for name, facts in rows(config) if facts.names_store)
    return [path for text in given for path in split_paths(text)]


def split_paths(text: str) -> list[str]:
    """Split [a, b] for `a, b`; the name of a folder may hold a comma where the whole is one."""
    if "," in text and os.path.isdir(text):
        return [text]
    return [path.strip() for path in text.split(",") if path.strip()]
