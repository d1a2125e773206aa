"""Run steps of one virtual rank: DeepSpeed's real engine and this project's real model, with fake
tensors and a fake process group.

Fake tensors have shapes, types and no content, so a rank of any size runs on a laptop; a fake group
accepts every collective and does nothing. A computation that asks for a value gets 1, or 0 for a
flag.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import groups
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.machines.processes import leave_out_shared_memory
from megatron_interbert.model.flops import Tokens
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import Load
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.engine import Engine, engine_settings
from megatron_interbert.training.fragments import FragmentedState, Outline
from megatron_interbert.training.micro_batch import load_of
from megatron_interbert.training.model_plan import ModelPlan, build_model
from megatron_interbert.training.routing_health import RoutingHealth
from megatron_interbert.training.swap import swap_in_folder
from megatron_interbert.virtual.stand_ins import balanced_experts, nvme_without_disk
from megatron_interbert.virtual.tracking import Collective, Tracker

HERE = torch.device("cpu")
FLAGS = (torch.bool, torch.uint8)


@dataclass
class Rehearsal:
    """Hold what a virtual rank did in its last step: bytes of what stays between steps and of the
    peak, collectives in order, the load of its largest micro-batch, and the runs that it saves.
    """

    rank: int
    tensor_rank: int
    data_rank: int
    sizes: ModelConfig
    shapes: dict[str, tuple[int, ...]]  # of the parameters' tensor-parallel slices
    kernels: Kernels
    expert_rank: int = 0
    expert_data_rank: int = 0
    secondary_group: int = 0  # number of the group that holds all weights once more, if any does
    states: int = 0
    peak: int = 0
    collectives: list[Collective] = field(default_factory=list)
    load: Load | None = None
    tokens: list[Tokens] = field(default_factory=list)  # of each micro-batch
    outline: list[Outline] = field(default_factory=list)


class VirtualState(ParallelState):
    """Be one of many ranks whose others do not exist: what is gathered is this rank's own."""

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        return [value] * self.world_size

    @property
    def names(self) -> dict[str, str]:
        """Return the name of each group by torch's name of it."""
        return {
            group.group_name: name
            for name, group in (
                ("tensor", self.tensor_group),
                ("data", self.data_group),
                ("expert", self.expert_group),
                ("expert_data", self.expert_data_group),
            )
            if group is not None
        }


class ShapesOnly(FakeTensorMode):
    """Give every value that a computation asks for as 1, and every flag as 0: DeepSpeed skips an
    update if one says that gradients are not finite.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return torch.tensor(dtype not in FLAGS, dtype=dtype).item()
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@contextlib.contextmanager
def one_of(world_size: int, rank: int) -> Iterator[None]:
    """Make this process one of `world_size` ranks within the context, without the others."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    meeting = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": 29500}
    variables = {name: str(value) for name, value in (place | meeting).items()}

    with mock.patch.dict(os.environ, variables):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            leave_out_shared_memory()
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
            yield
        finally:
            deepspeed.comm.destroy_process_group()  # and DeepSpeed's references to its groups


@contextlib.contextmanager
def without_values() -> Iterator[ShapesOnly]:
    """Let DeepSpeed work on fake tensors within the context: it looks at their addresses, compares
    lists with those of rank 0, and asks whether the processor computes in float16.
    """
    utils = "deepspeed.runtime.zero.utils"
    with (
        ShapesOnly(allow_non_fake_inputs=True) as mode,
        mock.patch.object(FakeTensor, "data_ptr", return_value=0),
        mock.patch.object(CPU_Accelerator, "is_fp16_supported", return_value=True),
        mock.patch(f"{utils}.assert_lst_len_same_as_other_ranks"),
        mock.patch(f"{utils}.get_lst_from_rank0", side_effect=list),
    ):
        yield mode


def rehearse(
    config: TrainConfig,
    job: Job,
    plan: ModelPlan,
    state: VirtualState,
    micro_batches: list[PackedBatch],
) -> Rehearsal:
    """Build a rank's engine and run one step with Adam's moments in place."""
    names = plan.without_memory()
    shapes = {name: tuple(parameter.shape) for name, parameter in names.named_parameters()}
    place = (state.rank, state.tensor_rank, state.data_rank)
    found = Rehearsal(*place, job.model_config, shapes, plan.kernels)
    found.expert_rank = state.expert_rank
    found.expert_data_rank = state.expert_data_rank
    streams = RandomStreams(config.seed, state.data_rank, state.tensor_rank)

    with (
        nvme_without_disk() as folder,
        balanced_experts(),
        without_values() as mode,
        Tracker(state.names) as tracker,
    ):
        settings = swap_in_folder(engine_settings(config, state, names), lambda _: folder)
        model = build_model(plan, config, streams, HERE, settings)
        model.to = lambda *_, **__: model  # fake parameters cannot be moved, nor need to be
        engine = Engine(model, config, state, settings=settings)
        if secondary := groups._get_zero_param_intra_parallel_group():
            tracker.groups[secondary.group_name] = "secondary"
            found.secondary_group = state.data_rank // secondary.size()

        held = FragmentedState(engine)
        found.outline = held.outline()
        for _ in held.held():  # creates the moments
            pass

        batches = [as_fake(mode, batch) for batch in micro_batches]
        if config.zero_stage == 3:  # from the second step on weights are gathered ahead
            run_step(engine, job, batches, streams)

        tracker.collectives.clear()
        found.states = tracker.live
        tracker.mark()
        applied = run_step(engine, job, batches, streams)
        found.peak = tracker.mark()
        found.collectives = list(tracker.collectives)

    if not applied:
        raise RuntimeError("DeepSpeed skipped the update, whose memory would be missing")

    found.tokens = [Tokens.of(batch) for batch in micro_batches]
    found.load = max((load_of(batch) for batch in micro_batches), key=lambda load: load.samples)

    return found


def run_step(
    engine: Engine, job: Job, micro_batches: list[PackedBatch], streams: RandomStreams
) -> bool:
    """Run an optimizer step as the training loop does; return whether weights were updated."""
    counts = torch.stack([job.task.count_targets(batch) for batch in micro_batches]).sum(dim=0)
    totals = engine.state.sum_over_data(counts)
    streams.start_step(1)
    routing = RoutingHealth(engine.config, job.model_config, engine.state)

    for number, batch in enumerate(micro_batches):
        output = engine.forward(batch)
        loss = job.task.loss(output, batch, totals)[0] + routing.loss(output)
        del output
        engine.backward(loss, last=number == len(micro_batches) - 1)
        del loss

    _, applied = engine.step(1e-4)
    return applied


def as_fake(mode: FakeTensorMode, batch: PackedBatch) -> PackedBatch:
    """Return a batch with fake tensors in place of its own."""
    return PackedBatch(
        **{
            entry.name: mode.from_tensor(value)
            if isinstance(value := getattr(batch, entry.name), torch.Tensor)
            else value
            for entry in fields(batch)
        }
    )
