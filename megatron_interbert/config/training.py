"""Hold and check the settings of training runs, and compute their batches."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.model import FLOAT8_MULTIPLE, ModelConfig
from megatron_interbert.config.options import AUTO, FREE, setting
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
    """Hold the settings of every training run, whatever it trains on."""

    GROUP: ClassVar[str] = "more"

    exit_interval: int = setting(
        0,
        "save and end after a step that is a multiple of this; the same command resumes; 0: never",
        FREE,
        least=0,
    )
    exit_duration_in_mins: float = setting(
        0.0, "save and end after X minutes; the same command resumes; 0: never", FREE, least=0
    )
    hang_timeout: int = setting(
        300,
        "end the run if no rank advances for this many seconds, or 10 times the longest step so"
        " far; 0: never",
        FREE,
        least=0,
    )
    print_launch: bool = setting(False, "print which rank would run where, and end", FREE)

    # a run sets its own once it knows how many ranks there are
    data_parallel_size: ClassVar[int] = 1
    # the disk of a run that names none; a rehearsal, which writes nothing, has one
    usual_disk: ClassVar[str] = ""

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Return the micro-batches per optimizer step and rank.

        Raises UsageError unless the batch sizes divide.
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
        """Fit batch sizes that were not given to the number of data-parallel ranks."""
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
            reason = f"a rank's share of {self.told('global_batch_size')} is {share}"
            if self.micro_batch_multiple > 1:
                reason += f", routing groups need a multiple of {self.micro_batch_multiple}"
            self.fit("micro_batch_size", self.dividing_micro_batch(share), reason)

    def dividing_micro_batch(self, share: int) -> int:
        """Return the largest micro-batch, up to the default, that divides a rank's share of the
        global batch; above the default if it must be a multiple of more.
        """
        multiple = self.micro_batch_multiple
        if share % multiple:
            multiple = 1  # and it is refused later

        parts = share // multiple
        most = min(max(self.micro_batch_size // multiple, 1), parts)

        return multiple * max(n for n in range(1, most + 1) if parts % n == 0)

    def fit_to_groups(self) -> None:
        """Fit settings to routing groups, which only pretraining has."""

    def fit_partitions(self, samples: int) -> int:
        """Settle into how many partitions `samples` are cut, and return the number.

        A number that was given stays. A default that exceeds the samples or is not a multiple of
        the data-parallel size becomes that size times a power of 2: the same for 1, 2, 4, .. ranks.
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
        """Take ZeRO stage 0 for a single process in fp32: with nothing to shard it is fastest."""
        alone = processes == 1 and not (self.fp16 or self.bf16)
        if alone and self.is_default("zero_stage") and not self.deepspeed_config:
            self.zero_stage = 0

    def check_ranks(self, processes: int) -> None:
        """Raise UsageError if tensor-parallel or expert-parallel groups do not divide a run's
        processes.
        """
        for name in ("tensor_model_parallel_size", "expert_parallel_size"):
            if processes % getattr(self, name):
                raise UsageError(
                    f"--world-size {processes} is not a multiple of {self.told(name)}; change one"
                    " of them"
                )

    @property
    def micro_batch_multiple(self) -> int:
        """Return of how many samples a micro-batch must be a multiple."""
        return 1

    def global_batch(self, data_parallel_size: int) -> int:
        """Return the samples per optimizer step over all ranks."""
        return (
            self.micro_batch_size * data_parallel_size * self.accumulation_steps(data_parallel_size)
        )

    def minutes_between_saves(self) -> float:
        """Return the minutes after which a checkpoint is due; 0 if only steps count."""
        by_steps = "save_interval" in self.given and "save_interval_in_mins" not in self.given
        return 0.0 if by_steps else self.save_interval_in_mins

    def milestones(self) -> list[float]:
        """Return the shares of --lr-milestones; raises UsageError unless they rise in (0, 1)."""
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
                "--deterministic and --micro-batch-size auto exclude each other: trials do not"
                " choose the same every time; give a number"
            )

        self.milestones()

    def check_float8(self, sizes: ModelConfig) -> None:
        """Raise UsageError if --fp8 is given without bf16 or does not fit the model.

        It is checked once bf16 is settled, perhaps by a DeepSpeed JSON, and `sizes`, perhaps by the
        data.
        """
        if not self.fp8:
            return
        if not self.bf16:
            raise UsageError("--fp8 needs --bf16: only the layers' products are computed in 8 bits")
        for name in ("hidden_size", "ffn_hidden_size"):
            if getattr(sizes, name) % (FLOAT8_MULTIPLE * self.tensor_model_parallel_size):
                raise UsageError(
                    f"--fp8: {name} {getattr(sizes, name)} of the model is not a multiple of"
                    f" {FLOAT8_MULTIPLE} on each of {self.tensor_model_parallel_size}"
                    " tensor-parallel ranks; leave --fp8 out or choose other sizes"
                )
