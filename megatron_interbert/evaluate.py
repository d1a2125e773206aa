"""Evaluation of a checkpoint: `python -m megatron_interbert.evaluate TASK --load RUN ..`, or under deepspeed or torchrun on many."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_interbert.config import parse_task
from megatron_interbert.errors import Preempted, run_entry
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import ParallelState, this_device
from megatron_interbert.signals import STOPPING, take_over
from megatron_interbert.task_config import (
    EvaluateConfig,
    EvaluateGlueConfig,
    EvaluateRetrievalConfig,
    EvaluateVcrConfig,
)
from megatron_interbert.tasks.glue_evaluation import evaluate_glue
from megatron_interbert.tasks.retrieval_evaluation import evaluate_retrieval
from megatron_interbert.tasks.vcr_evaluation import evaluate_vcr
from megatron_interbert.training.watchdog import Watchdog

TASKS: dict[str, tuple[type[EvaluateConfig], Callable[..., Any]]] = {
    "retrieval": (EvaluateRetrievalConfig, evaluate_retrieval),
    "vcr": (EvaluateVcrConfig, evaluate_vcr),
    "glue": (EvaluateGlueConfig, evaluate_glue),
}


def run() -> None:
    """`evaluate TASK FLAGS`."""
    config, evaluate = parse_task(TASKS, "evaluate retrieval --load RUN --data-path STORE")
    if read_launch().world_size > 1:
        from megatron_interbert.training.processes import start_processes  # a single process needs no DeepSpeed

        device = start_processes()
    else:
        device = this_device()
    state = ParallelState(config.tensor_model_parallel_size)
    take_over(STOPPING, stop)
    watchdog = Watchdog(state, config.hang_timeout)
    watchdog.enter("evaluation", 0)
    with watchdog.fed_by_modules():
        evaluate(config, state, device)
    watchdog.close()


def stop(number: int, frame: FrameType | None) -> None:
    """Nothing needs to be saved: what is finished lies on disk already."""
    print(f"{signal.Signals(number).name}: the evaluation ends here; the same command goes on", file=sys.stderr, flush=True)
    raise Preempted


def main() -> None:
    """Entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
