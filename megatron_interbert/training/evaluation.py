"""Evaluations during training: losses of pretraining on unseen scenes, or a downstream task's
figures on its validation set.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.machines.watchdog import Watchdog
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.precision import Precision
from megatron_interbert.tasks.task import Evaluate, Task
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import FragmentedState


class Evaluation(Protocol):
    """Named figures of the weights as they are now, the same on all ranks."""

    def run(
        self, engine: Engine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], str] | None:
        """Give (figures, the part of the log line for people).

        Tells the watchdog that it is alive; None where all ranks have agreed by `stop` to give it
        up.
        """


class LossEvaluation:
    """Losses and accuracies of the training task over the first `batches` batches of a stream,
    dropout off.
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
            if stop():  # here all ranks have done equally many batches
                return None

        return report


class DownstreamEvaluation:
    """A task's own figures, of a copy of the model that holds the averaged weights where there are
    such, else the current ones.

    The copy is whole on every data-parallel rank (a tensor-parallel slice), whatever the ZeRO
    stage, and computes in a `precision` of its own. It is not given up half-way: the ranks share
    out its work unequally and have no common moment to agree.
    """

    def __init__(
        self,
        copy: InterBert,
        evaluate: Evaluate,
        state: ParallelState,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.copy = precision.convert(copy.to(device))
        self.evaluate = evaluate
        self.state = state
        self.device = device
        self.precision = precision

    @torch.no_grad()
    def run(
        self, engine: Engine, watchdog: Watchdog, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], str]:
        kind = "ema" if engine.ema is not None else "weight"
        FragmentedState(engine).copy_into(self.copy, kind)
        with watchdog.fed_by_modules(), self.precision.products():
            values = self.evaluate(self.copy.eval(), self.state, self.device)
        return values, " | ".join(f"{name} {value:.2f}" for name, value in values.items())
