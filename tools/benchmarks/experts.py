"""Compare a layer with experts with the dense layer of the same active work: what routing, sorting
and the exchange of rows cost beside the products.

A layer of one prototype has the products of the dense layer for each token, and one more: that of
the router. Ranks that divide the experts each train on tokens of their own, as the dense layer's
do, and no gradients are summed in either. A third layer has the same experts with an equal run of
rows for each, neither chosen nor exchanged: it shows what short products cost alone.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import option
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.machines.processes import aligned
from megatron_interbert.model.experts import ExpertMlps, Experts
from megatron_interbert.model.routing_groups import RoutedTokens
from megatron_interbert.model.transformer import Mlp, TransformerLayer
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from tools.benchmarks.batches import sizes_of
from tools.benchmarks.options import BenchmarkOptions
from tools.benchmarks.ranks import run_ranks


@dataclass
class Options(BenchmarkOptions):
    """Measure the time of a layer with experts over that of a dense one."""

    model: str = option("base", "preset or JSON file of sizes", group="model")
    experts: int = option(8, "experts of the layer", least=1, group="model")
    ranks: int = option(2, "processes that divide the experts; 1: no exchange", least=1)
    samples: int = option(64, "samples of a rank's micro-batch, of about 51 tokens", least=1)
    rounds: int = option(15, "measured passes of each layer, in turn", least=1)


def measure(options: Options) -> dict[str, Any]:
    """Run all ranks, and print the table of their first one."""
    result = run_ranks(serve, options.ranks, options)
    rows = [("layer", "seconds", "over dense")]
    for name, seconds in result["seconds"].items():
        rows.append((name, f"{seconds:.4f}", f"{result['ratios'][name]:.3f}"))
    print(f"{result['tokens']} tokens on each of {options.ranks} ranks, forward and backward:")
    print(*aligned(rows), sep="\n")

    return result


def serve(rank: int, options: Options) -> dict[str, Any]:
    """Be one rank: time the layers in turn."""
    state = ParallelState(expert_parallel_size=options.ranks)
    sizes = dataclasses.replace(sizes_of(options.model).without_dropout(), experts=options.experts)
    layers = layers_of(sizes, state, choose_kernels("auto", torch.device("cpu")))
    x, sequences = packed(options.samples, sizes.hidden_size, seed=rank)
    times: dict[str, list[float]] = {name: [] for name in layers}

    for number in progress(range(options.rounds + 2), desc="rounds", shown=rank == 0):
        for name, layer in layers.items():
            dist.barrier()
            seconds = timed(layer, x, sequences)
            if number > 1:  # the first ones allocate memory
                times[name].append(max(state.gather(seconds)))

    dense = np.array(times["dense"])
    return {
        "tokens": len(x),
        "seconds": {name: statistics.median(of_layer) for name, of_layer in times.items()},
        "ratios": {name: statistics.median(of / dense) for name, of in times.items()},
    }


def layers_of(
    sizes: ModelConfig, state: ParallelState, kernels: Kernels
) -> dict[str, TransformerLayer]:
    """Return a dense layer and one with experts, of the same width, with the weights that training
    starts from: routers then load the experts almost equally.
    """
    streams = RandomStreams(0, alone=True)

    def layer(mlp: nn.Module) -> TransformerLayer:
        heads = sizes.num_attention_heads
        shared = (0.0, 0.0, sizes.layer_norm_eps, state.placement, kernels, streams)
        built = TransformerLayer(sizes.hidden_size, heads, mlp, *shared)
        for name, parameter in built.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=sizes.initializer_range)

        return built

    torch.manual_seed(0)
    widths = (sizes.hidden_size, sizes.ffn_hidden_size)
    here = sizes.experts // state.expert_size

    return {
        "dense": layer(Mlp(*widths, state.placement, kernels)),
        "experts without routing": layer(InRuns(ExpertMlps(here, *widths, state, kernels))),
        f"{sizes.experts} experts": layer(Experts(sizes, state, kernels)),
    }


class InRuns(nn.Module):
    """Give each expert of this rank an equal run of the rows."""

    def __init__(self, experts: ExpertMlps) -> None:
        super().__init__()
        self.experts = experts

    def forward(
        self, x: torch.Tensor, tokens: RoutedTokens | None = None
    ) -> tuple[torch.Tensor, None]:
        """Return the results [N, H], and no report."""
        experts = len(self.experts.up.weight)
        ends = [len(x) * number // experts for number in range(experts + 1)]
        return self.experts(x, [end - start for start, end in pairwise(ends)]), None


def packed(samples: int, hidden: int, seed: int) -> tuple[torch.Tensor, Sequences]:
    """Return packed tokens of samples of 44 to 58 tokens."""
    torch.manual_seed(seed + 1)
    lengths = torch.randint(44, 59, (samples,))
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    x = torch.randn(int(lengths.sum()), hidden, requires_grad=True)

    return x, Sequences(offsets, int(lengths.max()))


def timed(layer: TransformerLayer, x: torch.Tensor, sequences: Sequences) -> float:
    """Return the seconds of a forward and a backward pass."""
    layer.zero_grad()
    started = time.monotonic()
    y, _ = layer(x, sequences)
    y.sum().backward()

    return time.monotonic() - started
