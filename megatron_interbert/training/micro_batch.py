"""`--micro-batch-size auto`: how many samples a forward pass takes, by trial on these machines with
this model and these data.
"""

import time
from collections.abc import Callable

import torch

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.errors import UsageError, local_errors, out_of_memory
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.machines.host import free_memory
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.memory import Layout, Load, predict
from megatron_interbert.training.model_plan import working_dtype

USED = 0.8  # share of the memory that a step may take by arithmetic, which is right to a tenth
AS_GOOD = 0.97  # share of the best rate that is as good
LONGEST_TRIAL = 20.0  # seconds of a pass after which no larger one is tried


def layout_of(config: TrainConfig, data_parallel_size: int, kernels: Kernels) -> Layout:
    """Describe how a run trains for the arithmetic of memory."""
    return Layout(
        data=data_parallel_size,
        tensor=config.tensor_model_parallel_size,
        zero_stage=config.zero_stage,
        half=config.bf16 or config.fp16,
        fused=kernels.fused,
        recompute=config.recompute_activations,
        sequence_parallel=config.sequence_parallel,
        loss_scale=config.fp16,
    )


def load_of(batch: PackedBatch) -> Load:
    """Describe a micro-batch for the arithmetic of memory."""
    rows = len(batch)
    return Load(
        rows,
        len(batch.token_ids) / rows,
        len(batch.features) / rows,
        batch.max_text,
        max(batch.max_image - 1, 0),
    )


class Trial:
    """Passes of a model over real samples, on all ranks at once."""

    def __init__(
        self,
        config: TrainConfig,
        job: Job,
        state: ParallelState,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.job = job
        self.state = state
        self.device = device
        self.dtype = working_dtype(config)
        self.layout = layout_of(config, state.data_size, kernels)

    def batch(self, samples: int) -> PackedBatch:
        """Give the first samples of this rank."""
        found: TrainingSet = self.job.samples
        positions = range(
            self.state.data_rank,
            self.state.data_rank + samples * self.state.data_size,
            self.state.data_size,
        )

        return to_batch(found.fields(found.order.pairs(positions, 0)))

    def fits(self, batch: PackedBatch, room: float) -> bool:
        """Tell whether a step with such batches stays within `room` bytes on every rank."""
        peak = predict(self.job.model_config, self.layout, load_of(batch)).peak
        return all(self.state.gather(peak <= room))

    def seconds(self, model: InterBert, batch: PackedBatch) -> float | None:
        """Time a forward and a backward pass on the slowest rank; None where a rank lacks memory.

        The best of three, for others may disturb one.
        """
        times = []

        for _ in range(3):
            gathered = self.state.gather(self._seconds_here(model, batch))
            if None in gathered:
                return None
            times.append(max(gathered))

        return min(times)

    def _seconds_here(self, model: InterBert, batch: PackedBatch) -> float | None:
        """Time the passes on this rank; None where memory has run out, which is then free again."""
        try:
            batch = batch.to(self.device)
            totals = self.job.task.count_targets(batch).to(self.device)
            self.synchronise()
            started = time.monotonic()
            self.job.task.loss(model(batch), batch, totals)[0].backward()
            self.synchronise()

            return time.monotonic() - started
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if self.state.tensor_size > 1:  # the others wait for this one in a collective
                with local_errors():
                    raise UsageError(
                        f"--micro-batch-size auto: memory ran out with {len(batch)} samples, which"
                        " was predicted to fit; give a number below that"
                    ) from error

            return None
        finally:
            model.zero_grad()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_micro_batch(
    trial: Trial, make_model: Callable[[], InterBert], global_batch: int, alive: Callable[[], None]
) -> int:
    """Choose the largest micro-batch that divides a rank's share of the global batch, fits, and is
    as fast as the best one, alike on all ranks. `alive` is called before each trial. UsageError
    when not one sample fits, or there is no share to divide.
    """
    state = trial.state
    share = share_of(global_batch, state.data_size)
    room = memory_of(trial.device) * USED
    rates = measure_rates(trial, make_model, share, room, alive)
    if not rates:
        raise UsageError(
            f"--micro-batch-size auto: not one sample fits {room / 2**30:.1f} GiB; python"
            " tools/plan.py lists layouts that fit a device"
        )

    best = max(size for size, rate in rates.items() if rate >= AS_GOOD * max(rates.values()))
    if state.is_main:
        tried = ", ".join(f"{size}: {rate * state.data_size:.1f}" for size, rate in rates.items())
        print(
            f"micro-batch size {best} of {share} a rank, by trial (samples/s of forward and"
            f" backward passes: {tried})",
            flush=True,
        )

    return best


def share_of(global_batch: int, data_size: int) -> int:
    """Return the samples of one rank in a step; UsageError where they cannot be shared out."""
    if not global_batch:
        raise UsageError("--micro-batch-size auto needs --global-batch-size, which it divides")
    if global_batch % data_size:
        raise UsageError(
            f"--global-batch-size {global_batch} is not a multiple of the data-parallel size"
            f" {data_size}"
        )

    return global_batch // data_size


def measure_rates(
    trial: Trial,
    make_model: Callable[[], InterBert],
    share: int,
    room: float,
    alive: Callable[[], None],
) -> dict[int, float]:
    """Return samples per second by micro-batch size, from small to large, up to the last one that
    fits `room` bytes and is worth a trial.
    """
    model = make_model().to(trial.device, trial.dtype).train()
    rates: dict[int, float] = {}

    for samples in (size for size in range(1, share + 1) if share % size == 0):
        if rates and samples < 2 * max(rates) and samples < share:
            continue

        alive()
        with local_errors():
            batch = trial.batch(samples)
        if not trial.fits(batch, room):
            break

        seconds = trial.seconds(model, batch)
        if seconds is None:  # arithmetic is right to a tenth; the device has the last word
            break

        rates[samples] = samples / seconds
        worse = len(rates) > 3 and all(
            rate < AS_GOOD * max(rates.values()) for rate in list(rates.values())[-3:]
        )
        if seconds > LONGEST_TRIAL or worse:
            break

    return rates


def still_fits(trial: Trial, samples: int) -> bool:
    """Tell whether micro-batches that a run before chose fit here: into all that is free, for what
    is free has its ups and downs.
    """
    with local_errors():
        batch = trial.batch(samples)
    return trial.fits(batch, memory_of(trial.device))


def memory_of(device: torch.device) -> float:
    """Give bytes that this rank may use: of its GPU, or its part of what is free on the machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() / read_launch().local_size
