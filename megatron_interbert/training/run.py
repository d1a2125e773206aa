"""Start a run: its configuration, ranks, device, watchdog and stop signals."""

from dataclasses import dataclass

import torch

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.machines.host import same_bits_every_time
from megatron_interbert.machines.processes import describe_launch, start_processes
from megatron_interbert.machines.watchdog import Watchdog
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.deepspeed_config import agree_with_json
from megatron_interbert.training.stopping import Stopping


@dataclass(frozen=True)
class Run:
    """Hold what all parts of a run share. `config` is frozen before the model is built."""

    config: TrainConfig
    state: ParallelState
    device: torch.device
    streams: RandomStreams
    watchdog: Watchdog
    stopping: Stopping

    def say(self, *lines: str) -> None:
        """Print lines, on rank 0 only."""
        if self.state.is_main and lines:
            print(*lines, sep="\n", flush=True)


def meet(config: TrainConfig) -> Run:
    """Check the configuration as far as one rank can, and connect the ranks.

    Raises SystemExit after --print-launch.
    """
    config.check()
    agree_with_json(config)
    if config.deterministic:
        same_bits_every_time()

    device = start_processes()
    state = ParallelState(
        config.tensor_model_parallel_size,
        config.sequence_parallel,
        expert_parallel_size=config.expert_parallel_size,
    )

    if config.print_launch:
        text = describe_launch(read_launch(), state, device)
        if state.is_main:
            print(text, flush=True)
        raise SystemExit

    config.data_parallel_size = state.data_size
    config.fit_zero_stage(state.world_size)

    return Run(
        config,
        state,
        device,
        random_streams(config, state, device),
        Watchdog(state, config.hang_timeout),
        Stopping(config, state),
    )


def random_streams(
    config: TrainConfig, state: ParallelState, device: torch.device
) -> RandomStreams:
    """Build the random streams from which dropout draws on this rank."""
    alone = state.tensor_size == 1
    return RandomStreams(config.seed, state.data_rank, state.tensor_rank, device, alone)
