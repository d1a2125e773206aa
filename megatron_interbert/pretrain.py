"""Pretrain: `deepspeed launchers/pretrain.sh ARGS`, `torchrun -m megatron_interbert.pretrain ARGS`,
or one plain process.
"""

import signal
from collections.abc import Callable, Sequence

from megatron_interbert.command_line import parse
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import end_at_once, run_entry
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.sample.missing import make_missing_sample
from megatron_interbert.signals import STOPPING, handle_signals
from megatron_interbert.training.setup import prepare

ABOUT = "Pretrain InterBERT on a region store."
# flags to add to those that were given, from the configuration that these make
Recipe = Callable[[RunConfig], Sequence[str]]


def run(recipe: Recipe = lambda told: (), about: str = ABOUT) -> None:
    """Parse the flags, build the parts and train."""
    handle_signals((*STOPPING, signal.SIGINT), end_at_once)  # until the run handles them itself
    config = parse(RunConfig, about, recipe=recipe(parse(RunConfig, about)))
    config.check()
    read_launch()
    this_device()  # raises for too many processes on this machine, before anything is made
    make_missing_sample(config)
    prepare(config).train()


def main(recipe: Recipe = lambda told: (), about: str = ABOUT) -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(lambda: run(recipe, about))


if __name__ == "__main__":
    main()
