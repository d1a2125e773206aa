"""Pretraining: `deepspeed launchers/pretrain.sh ARGS`, `torchrun -m megatron_interbert.pretrain`, or one plain process."""

from megatron_interbert.command_line import parse
from megatron_interbert.config import RunConfig
from megatron_interbert.errors import end_at_once, run_entry
from megatron_interbert.signals import STOPPING, take_over
from megatron_interbert.training.setup import prepare


def run() -> None:
    """Parse, build the parts, train."""
    take_over(STOPPING, end_at_once)  # until the run takes them over itself
    config = parse(RunConfig, "Pretrain InterBERT on a region store.")
    prepare(config).train()


def main() -> None:
    """Entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
