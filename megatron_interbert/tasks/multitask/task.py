"""Compute the losses of several tasks, one in each batch."""

from collections.abc import Mapping
from itertools import accumulate

import torch

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBertOutput
from megatron_interbert.tasks.task import Task


class MultiTask:
    """Compute the loss of the task that a batch is for, multiplied by that task's weight.

    Heads of other tasks get a gradient of zeros.
    """

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float]) -> None:
        self.tasks = dict(tasks)
        self.weights = {name: weights.get(name, 1.0) for name in tasks}
        kinds = [task.report_shape[0] for task in tasks.values()]
        starts = [0, *accumulate(kinds)]
        self.places = {
            name: slice(start, start + count)
            for name, start, count in zip(tasks, starts, kinds, strict=False)
        }
        self.report_shape = (sum(kinds), 3)

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        """Return the number of targets of each kind of each task in a batch, float64 [kinds]."""
        counts = torch.zeros(self.report_shape[0], dtype=torch.float64)
        counts[self.places[batch.head]] = self.tasks[batch.head].count_targets(batch)

        return counts

    def loss(
        self, output: InterBertOutput, batch: PackedBatch, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's share of the step's loss, and the batch's report [kinds, 3]."""
        place = self.places[batch.head]
        loss, own = self.tasks[batch.head].loss(output, batch, totals[place])
        report = own.new_zeros(self.report_shape)
        report[place] = own

        return self.weights[batch.head] * loss + nothing_of(output), report

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Return the metrics of the tasks that the steps have trained, each with the task's name
        before it, and `loss`, the mean over these tasks.
        """
        values: dict[str, float] = {}
        losses = []

        for name, place in self.places.items():
            if not report[place, 2].any():
                continue

            found = self.tasks[name].metrics(report[place], steps)
            losses.append(self.weights[name] * found["loss"])
            for figure, value in found.items():
                values[f"{name}_{figure.removeprefix(f'{name}_')}"] = value

        return {"loss": sum(losses) / max(len(losses), 1), **values}

    def line(self, values: dict[str, float]) -> str:
        """Return the text for a log line, such as `loss 0.4100 | vqa 1.700 | nlvr2 0.690`."""
        parts = [
            f"{name} {values[f'{name}_loss']:.3f}"
            for name in self.tasks
            if f"{name}_loss" in values
        ]
        return " | ".join([f"loss {values['loss']:.4f}", *parts])


def nothing_of(output: InterBertOutput) -> torch.Tensor:
    """Return 0, with a gradient of zeros for the head of every task."""
    shared = (output.itm_logits, output.choice_logit)
    outputs = [*(output.task_outputs or {}).values(), *(o for o in shared if o is not None)]

    return torch.stack([some[:0].sum() for some in outputs]).sum()
