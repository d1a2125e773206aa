"""Evaluations during training: losses of pretraining on unseen scenes, or a downstream task's figures on its validation set."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch.nn.modules.module import register_module_forward_hook

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.task import Evaluate, Task
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import FragmentedState


class Evaluation(Protocol):
    """Named figures of the weights as they are now, the same on all ranks."""

    def run(self, engine: Engine, beat: Callable[[], None]) -> tuple[dict[str, float], str]:
        """(figures, the part of the log line for people); calls `beat` while it goes on."""


class LossEvaluation:
    """Losses and accuracies of the training task over the first `batches` batches of a stream, dropout off."""

    def __init__(
        self, task: Task, stream: Callable[[], Iterator[PackedBatch]], batches: int, state: ParallelState, device: torch.device
    ) -> None:
        self.task, self.stream, self.batches, self.state, self.device = task, stream, batches, state, device

    @torch.no_grad()
    def run(self, engine: Engine, beat: Callable[[], None]) -> tuple[dict[str, float], str]:
        engine.deepspeed.eval()
        report = torch.zeros(self.task.report_shape, device=self.device)
        stream = self.stream()
        for _ in range(self.batches):
            batch = next(stream).to(self.device)
            report += self.task.loss(engine.forward(batch), batch, self.task.count_targets(batch))[1]
            beat()
        engine.deepspeed.train()
        values = self.task.metrics(self.state.sum_over_data(report))
        return values, self.task.line(values)


class DownstreamEvaluation:
    """A task's own figures, of a copy of the model that holds the averaged weights where there are such, else the current ones.

    The copy is whole on every data-parallel rank (a tensor-parallel slice), whatever the ZeRO stage.
    """

    def __init__(self, copy: InterBert, evaluate: Evaluate, state: ParallelState, device: torch.device) -> None:
        self.copy, self.evaluate, self.state, self.device = copy, evaluate, state, device

    @torch.no_grad()
    def run(self, engine: Engine, beat: Callable[[], None]) -> tuple[dict[str, float], str]:
        kind = "ema" if engine.ema is not None else "weight"
        FragmentedState(engine).copy_into(self.copy, kind)
        hook = register_module_forward_hook(lambda *_: beat())  # whatever part of the model a task runs: the work goes on
        try:
            values = self.evaluate(self.copy.eval(), self.state, self.device)
        finally:
            hook.remove()
        return values, " | ".join(f"{name} {value:.2f}" for name, value in values.items())
