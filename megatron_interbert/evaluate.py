"""Evaluate a checkpoint: `python -m megatron_interbert.evaluate TASK --load RUN ..`, or under
deepspeed or torchrun on several ranks.
"""

from megatron_interbert.command_line import parse_task
from megatron_interbert.errors import end_at_once, run_entry
from megatron_interbert.machines.facts import code_fingerprint, library_versions
from megatron_interbert.machines.watchdog import Watchdog
from megatron_interbert.parallel.agreement import check_alike
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.signals import STOPPING, handle_signals
from megatron_interbert.tasks.precision import settle_precision
from megatron_interbert.tasks.registry import EVALUATED


def run() -> None:
    """Read `evaluate TASK FLAGS`, start the ranks and evaluate."""
    handle_signals(STOPPING, end_at_once)  # what is finished is on disk
    config, evaluate = parse_task(EVALUATED, "retrieval --load RUN --data-path STORE")

    if read_launch().world_size > 1:
        # a single process needs no DeepSpeed
        from megatron_interbert.machines.processes import start_processes

        device = start_processes()
    else:
        device = this_device()

    state = ParallelState(config.tensor_model_parallel_size)
    check_alike(state, {"code": code_fingerprint(), **library_versions()})
    watchdog = Watchdog(state, config.hang_timeout)
    watchdog.enter("evaluation", 0)
    precision = settle_precision(config, device)
    with watchdog.fed_by_modules(), precision.products():
        evaluate(config, state, device)

    watchdog.close()


def main() -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
