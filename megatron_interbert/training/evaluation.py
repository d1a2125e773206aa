"""Evaluate during training: pretraining losses on unseen scenes, or a downstream task's metrics on
its validation set.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.machines.watchdog import Watchdog
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.precision import Precision
from megatron_interbert.tasks.task import Evaluate, Task
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.evaluation_copy import EvaluationCopy
from megatron_interbert.training.fragments import FragmentedState


class Evaluation(Protocol):
    """Measure named metrics of the current weights, the same on all ranks."""

    def run(
        self, engine: Engine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], str] | None:
        """Return (metrics, their part of the log line).

        Reports progress to the watchdog. None if all ranks agreed, by `stop`, to abandon the
        evaluation.
        """


class LossEvaluation:
    """Measure the training task's losses and accuracies over the first `batches` batches of a
    stream, with dropout off.
    """

    def __init__(
        self,
        task: Task,
        stream: Callable[[], Iterator[PackedBatch]],
        batches: int,
        state: ParallelState,
        device: torch.device,
    ) -> None:
        self.task = task
        self.stream = stream
        self.batches = batches
        self.state = state
        self.device = device

    @torch.no_grad()
    def run(
        self, engine: Engine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], str] | None:
        engine.deepspeed.eval()
        report = self._report(engine, watchdog, stop)
        engine.deepspeed.train()
        if report is None:
            return None

        values = self.task.metrics(self.state.sum_over_data(report))

        return values, self.task.line(values)

    def _report(
        self, engine: Engine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> torch.Tensor | None:
        report = torch.zeros(self.task.report_shape, device=self.device)
        stream = self.stream()

        for _ in range(self.batches):
            batch = next(stream).to(self.device)
            report += self.task.loss(engine.forward(batch), batch, self.task.count_targets(batch))[
                1
            ]
            watchdog.beat()
            if stop():  # all ranks have done the same number of batches here
                return None

        return report


class DownstreamEvaluation:
    """Measure a task's own metrics on a copy of the model, which takes the averaged weights if the
    run keeps them, else the current ones.

    The copy is in `precision`, which may differ from that of training. An evaluation cannot be
    abandoned half-way: the ranks share its work unevenly and have no common point at which to vote.
    """

    def __init__(
        self, copy: EvaluationCopy, evaluate: Evaluate, device: torch.device, precision: Precision
    ) -> None:
        self.copy = copy
        self.evaluate = evaluate
        self.device = device
        self.precision = precision

    @torch.no_grad()
    def run(
        self, engine: Engine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], str]:
        kind = "ema" if engine.ema is not None else "weight"
        self.copy.take(FragmentedState(engine), kind)

        with watchdog.fed_by_modules(), self.precision.products():
            values = self.evaluate(self.copy.model, self.copy.state, self.device)
        self.copy.finish()

        return values, " | ".join(f"{name} {value:.2f}" for name, value in values.items())
