"""Define ways to train that a benchmark times part by part: our engine, and a module over padded
batches as in usual training scripts.
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import Example, pack
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.task import AnswerTask
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.task import Task
from megatron_interbert.training.engine import Engine
from tools.benchmarks.batches import ANSWERS, PaddedBatch, answers_of, pad
from tools.benchmarks.padded import parameters
from tools.benchmarks.products import ProductTimer, flops_of_ours

PARTS = ("data", "forward", "backward", "optimizer")
PRODUCT_STEPS = 3  # steps in which products are timed one by one, after all rounds


def real_tokens(examples: list[Example]) -> int:
    """Return the number of words, regions and [IMG] tokens of samples."""
    return sum(len(e.token_ids) + len(e.features) + 1 for e in examples)


class Contender(ABC):
    """Represent one way to train: `step()` makes a batch of new samples, trains on it, and records
    the seconds of each part.

    `draw` returns the samples of a step by its number: all contenders see the same ones, and
    lengths vary from step to step, as in training.
    """

    def __init__(self, draw: Callable[[int], list[Example]], device: torch.device) -> None:
        self.draw = draw
        self.device = device
        self.drawn = 0
        self.examples: list[Example] = []
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}
        self.real_tokens: list[int] = []  # of each step, without padding

    def next_samples(self) -> None:
        """Draw the samples of the next step."""
        self.examples = self.draw(self.drawn)
        self.drawn += 1

    def step(self) -> float:
        """Run one step and return its seconds."""
        self.next_samples()
        self.real_tokens.append(real_tokens(self.examples))

        marks = [self._now()]
        for part in (self.make_batch, self.forward, self.backward, self.update):
            part()
            marks.append(self._now())

        for name, begin, end in zip(PARTS, marks[:-1], marks[1:], strict=True):
            self.seconds[name].append(end - begin)

        return marks[-1] - marks[0]

    def figures(self) -> dict[str, Any]:
        """Return all figures except the seconds of whole steps."""
        parts = {part: statistics.median(values) for part, values in self.seconds.items()}
        return {
            "parts": parts,
            "products": self._time_of_products(),
            "tokens": statistics.mean(self.real_tokens),
            "flops": self.flops,
            **self.own_figures(),
        }

    def _time_of_products(self) -> dict[str, float]:
        """Return the median seconds of the matrix products alone, by pass of a step."""
        found: dict[str, list[float]] = {"forward": [], "backward": []}

        for _ in range(PRODUCT_STEPS):
            self.next_samples()
            self.make_batch()

            for name, part in (("forward", self.forward), ("backward", self.backward)):
                with ProductTimer(self.device) as timer:
                    part()
                found[name].append(timer.seconds)

            self.update()

        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def first_step(self) -> None:
        """Run a first step, which allocates buffers, count the FLOPs of its matrix products, and
        discard its times.
        """
        counter = FlopCounterMode(display=False, custom_mapping=flops_of_ours())
        with counter:
            self.step()

        self.flops = counter.get_total_flops()
        self.seconds = {name: [] for name in PARTS}
        self.real_tokens = []

    @abstractmethod
    def own_figures(self) -> dict[str, Any]:
        """Return {parameters}, with `padded_tokens` if there are any."""

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @abstractmethod
    def make_batch(self) -> None:
        """Turn samples into tensors on the device."""

    @abstractmethod
    def forward(self) -> None:
        """Compute the loss."""

    @abstractmethod
    def backward(self) -> None:
        """Compute the gradients."""

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients and update the parameters."""


class Ours(Contender):
    """Train our model through our engine, as `pretrain` does."""

    HEADS: ClassVar[tuple[str, ...]] = PRETRAINING_HEADS
    TASK_HEADS: ClassVar[dict[str, TaskHead]] = {}

    def __init__(
        self,
        sizes: ModelConfig,
        draw: Callable[[int], list[Example]],
        device: torch.device,
        bf16: bool,
        kernels: Kernels,
        zero_stage: int,
    ) -> None:
        super().__init__(draw, device)
        self.state = ParallelState()
        batch = len(draw(0))
        together = batch * self.state.data_size
        config = RunConfig(
            micro_batch_size=batch, global_batch_size=together, bf16=bf16, zero_stage=zero_stage
        )
        model = InterBert(
            sizes, self.HEADS, state=self.state, kernels=kernels, task_heads=self.TASK_HEADS
        )
        initialise(model, sizes, 0, self.state)
        self.engine = Engine(model.to(device), config, self.state)
        self.task = self.make_task()

    def make_task(self) -> Task:
        """Return what computes the loss."""
        return PretrainingTask()

    def make_batch(self) -> None:
        self.batch = pack(self.examples, self.examples[0].features.shape[1]).to(self.device)

    def forward(self) -> None:
        counts = self.task.count_targets(self.batch)
        totals = self.state.sum_over_data(counts.to(self.device))
        self.loss = self.task.loss(self.engine.forward(self.batch), self.batch, totals)[0]

    def backward(self) -> None:
        self.engine.backward(self.loss, last=True)

    def update(self) -> None:
        self.engine.step(1e-4)

    def own_figures(self) -> dict[str, Any]:
        return {"parameters": parameters(self.engine.model)}


class OursForAnswers(Ours):
    """Train our model to answer questions through our engine, as `finetune vqa` does."""

    HEADS: ClassVar[tuple[str, ...]] = ()
    TASK_HEADS: ClassVar[dict[str, TaskHead]] = {"vqa": TaskHead("answers", ANSWERS)}

    def make_task(self) -> AnswerTask:
        return AnswerTask("vqa", 1, soft=True)

    def make_batch(self) -> None:
        batch = pack(self.examples, self.examples[0].features.shape[1])
        batch.head = "vqa"
        batch.labels = torch.from_numpy(answers_of(self.examples))
        batch.label_owner = torch.arange(len(batch))
        batch.label_scores = torch.ones(len(batch))
        self.batch = batch.to(self.device)


class Padded(Contender):
    """Train a module over padded batches with torch's AdamW, autocast, clipping and
    DistributedDataParallel, as usual training scripts do.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[int], list[Example]],
        tokens: int,
        regions: int,
        device: torch.device,
        bf16: bool,
    ) -> None:
        super().__init__(draw, device)
        self.model = model.to(device).train()
        self.tokens = tokens
        self.regions = regions
        self.bf16 = bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.parameters = parameters(model)
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.model)

    def make_batch(self) -> None:
        batch = pad(self.examples, self.tokens, self.regions)
        self.batch = PaddedBatch(
            **{name: value.to(self.device) for name, value in vars(batch).items()}
        )

    def forward(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.loss = self.model(self.batch)

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def own_figures(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "padded_tokens": len(self.examples) * (self.tokens + self.regions),
        }
