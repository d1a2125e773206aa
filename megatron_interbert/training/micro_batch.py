"""Choose the micro-batch size for `--micro-batch-size auto`, by timing this model on these machines
with these data.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.errors import UsageError, local_errors, out_of_memory
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.machines.host import free_memory
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import ON_DEVICE, Layout, Load
from megatron_interbert.planning.memory import Memory, predict
from megatron_interbert.tasks.precision import choose_precision
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.deepspeed_config import (
    offload_blocks,
    read_deepspeed_config,
    zero_settings,
)
from megatron_interbert.training.model_plan import working_dtype

# fields of a Layout by those of DeepSpeed's own model of its JSON
AT_ONCE = {
    "bucket": "reduce_bucket_size",
    "sub_group": "sub_group_size",
    "live": "max_live_parameters",
    "prefetch": "prefetch_bucket_size",
}
USED = 0.8  # share of memory a step may take by prediction, which is accurate to 10 %
AS_GOOD = 0.97  # rates from this share of the best one on count as equally good
LONGEST_TRIAL = 20.0  # seconds of a pass beyond which no larger size is tried


def layout_of(config: TrainConfig, data_parallel_size: int, kernels: Kernels) -> Layout:
    """Describe how a run trains, as input to predictions."""
    settings = read_deepspeed_config(config)
    blocks = offload_blocks(settings)
    places = {name: block.get("device", ON_DEVICE) for name, block in blocks.items()}
    given = given_by_json(zero_settings(settings), config.zero_stage, data_parallel_size)

    return Layout(
        data=data_parallel_size,
        tensor=config.tensor_model_parallel_size,
        expert=config.expert_parallel_size,
        zero_stage=config.zero_stage,
        half=config.bf16 or config.fp16,
        fused=kernels.fused,
        recompute=config.recompute_activations,
        sequence_parallel=config.sequence_parallel,
        loss_scale=config.fp16,
        accumulates=config.global_batch_size > max(config.micro_batch_size, 0) * data_parallel_size,
        averaged=config.ema_decay > 0,
        optimizer_on=places["offload_optimizer"],
        parameters_on=places["offload_param"],
        **given,
    )


def given_by_json(zero: DeepSpeedZeroConfig, stage: int, ranks: int) -> dict[str, int]:
    """Return the fields of a Layout of `ranks` data-parallel ranks that a DeepSpeed JSON sets,
    beside its ZeRO stage and the places of the state.
    """
    said = {name: key for name, key in AT_ONCE.items() if key in zero.model_fields_set}
    given = {name: getattr(zero, key) for name, key in said.items()}

    if "max_reuse_distance" in zero.model_fields_set:  # see engine_settings in engine.py
        given["live"] = max(zero.max_live_parameters, zero.max_reuse_distance // 2)
    if zero.offload_optimizer:
        given["swap_buffers"] = zero.offload_optimizer.buffer_count
    if zero.offload_param:
        given["parameter_buffers"] = zero.offload_param.buffer_count
        given["in_memory"] = zero.offload_param.max_in_cpu
        if "buffer_size" in zero.offload_param.model_fields_set:
            given["parameter_buffer"] = zero.offload_param.buffer_size
    if stage < 3:  # where groups are those of training/optimizer.py
        given.pop("sub_group", None)
    if stage == 3 and zero.zero_hpz_partition_size > 1:
        given["secondary"] = min(zero.zero_hpz_partition_size, ranks)

    return given


def load_of(batch: PackedBatch) -> Load:
    """Describe the lengths in a micro-batch, as input to the memory prediction."""
    rows = len(batch)
    return Load(
        rows,
        len(batch.token_ids) / rows,
        len(batch.features) / rows,
        batch.max_text,
        max(batch.max_image - 1, 0),
        word_targets=len(batch.msm_positions) / rows,
        region_targets=len(batch.mrm_positions) / rows,
    )


class Trial:
    """Try micro-batches of real samples on a model, on all ranks at once."""

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
        self.kernels = kernels
        self.layout = layout_of(config, state.data_size, kernels)
        if job.evaluate:
            precision = choose_precision(config.eval_precision, device)
            self.layout = replace(self.layout, copied=precision.bytes)

    def batch(self, samples: int) -> PackedBatch:
        """Build a micro-batch of this rank's first `samples` samples."""
        found: TrainingSet = self.job.samples
        positions = range(
            self.state.data_rank,
            self.state.data_rank + samples * self.state.data_size,
            self.state.data_size,
        )

        return to_batch(found.fields(found.order.pairs(positions, 0)))

    def fits(self, batch: PackedBatch, room: float) -> bool:
        """Check whether such a step is predicted to fit in `room` bytes on every rank."""
        more = self.config.global_batch_size > len(batch) * self.state.data_size
        layout = replace(self.layout, accumulates=more)
        memory = predict(self.job.model_config, layout, load_of(batch))
        return all(self.state.gather(needed_on(self.device, memory) <= room))

    def seconds(self, model: InterBert, batch: PackedBatch) -> float | None:
        """Return the seconds of a forward and a backward pass on the slowest rank; None if a rank
        runs out of memory.

        The best of three, since other work may disturb one of them.
        """
        times = []

        for _ in range(3):
            gathered = self.state.gather(self._seconds_here(model, batch))
            if None in gathered:
                return None
            times.append(max(gathered))

        return min(times)

    def _seconds_here(self, model: InterBert, batch: PackedBatch) -> float | None:
        """Time the passes on this rank; None if memory ran out (what they took is freed)."""
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
            if (
                self.state.tensor_size * self.state.expert_size > 1
            ):  # the others wait for this one in a collective
                with local_errors():
                    raise UsageError(
                        f"--micro-batch-size auto: memory ran out with {len(batch)} samples, which"
                        " was predicted to fit; give a number below that"
                    ) from error

            return None
        finally:
            model.zero_grad()

    def synchronise(self) -> None:
        """Wait until a GPU has finished its queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_micro_batch(
    trial: Trial, make_model: Callable[[], InterBert], global_batch: int, alive: Callable[[], None]
) -> int:
    """Choose the largest micro-batch that divides a rank's share of the global batch, fits, and is
    about as fast as the fastest; the same on all ranks.

    `alive` is called before each trial. Raises UsageError if not one sample fits or the global
    batch cannot be shared out.
    """
    state = trial.state
    share = share_of(global_batch, state.data_size)
    if isinstance(trial.config, RunConfig):
        trial.config.check_share(share)

    room = memory_of(trial.device) * USED
    rates = measure_rates(trial, make_model, share, room, alive)
    if not rates:
        raise UsageError(
            f"--micro-batch-size auto: not one sample fits in {room / 2**30:.1f} GiB;"
            " interbert plan lists layouts that fit a device"
        )

    best = max(size for size, rate in rates.items() if rate >= AS_GOOD * max(rates.values()))
    if state.is_main:
        tried = ", ".join(f"{size}: {rate * state.data_size:.1f}" for size, rate in rates.items())
        print(
            f"micro-batch size {best} of {share} per rank, by trial (samples/s of forward and"
            f" backward passes: {tried})",
            flush=True,
        )

    return best


def share_of(global_batch: int, data_size: int) -> int:
    """Return a rank's samples per step; UsageError if the global batch is 0 or does not divide."""
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
    """Return a rank's samples per second by micro-batch size, in ascending order, up to the last
    size that fits in `room` bytes and is worth trying.
    """
    model: InterBert | None = None  # is built once something fits
    rates: dict[int, float] = {}

    multiple = trial.config.micro_batch_multiple
    for samples in (n for n in range(multiple, share + 1, multiple) if share % n == 0):
        if rates and samples < 2 * max(rates) and samples < share:
            continue

        alive()
        with local_errors():
            batch = trial.batch(samples)
        if not trial.fits(batch, room):
            break

        model = model or make_model().train()
        seconds = trial.seconds(model, batch)
        if seconds is None:  # the prediction may be off by 10 %; the device decides
            break

        rates[samples] = samples / seconds
        worse = len(rates) > 3 and all(
            rate < AS_GOOD * max(rates.values()) for rate in list(rates.values())[-3:]
        )
        if seconds > LONGEST_TRIAL or worse:
            break

    return rates


def still_fits(trial: Trial, samples: int) -> bool:
    """Check whether the micro-batch size that the previous run chose still fits here.

    It may use all free memory, not only a share: how much is free varies from run to run.
    """
    with local_errors():
        batch = trial.batch(samples)
    return trial.fits(batch, memory_of(trial.device))


def needed_on(device: torch.device, memory: Memory) -> float:
    """Return the bytes that a rank needs where memory_of counts: a CPU is its own host."""
    return memory.peak if device.type == "cuda" else memory.together


def memory_of(device: torch.device) -> float:
    """Return the free bytes for this rank: of its GPU, or its share of the host's free memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() / read_launch().local_size
