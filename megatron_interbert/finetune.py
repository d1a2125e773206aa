"""Finetune: `deepspeed launchers/finetune.sh TASK ARGS`, or `python -m megatron_interbert.finetune
TASK ARGS` in one process.
"""

import signal

from megatron_interbert.command_line import parse_task
from megatron_interbert.errors import end_at_once, run_entry
from megatron_interbert.signals import STOPPING, handle_signals
from megatron_interbert.tasks.registry import FINETUNED
from megatron_interbert.training.setup import prepare


def run() -> None:
    """Read `finetune TASK FLAGS`, build the parts and train."""
    handle_signals((*STOPPING, signal.SIGINT), end_at_once)  # until the run handles them itself
    config, make_job = parse_task(FINETUNED, "retrieval --init-from RUN --data-path STORE")
    prepare(config, make_job).train()


def main() -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
