"""Run the whole model's passes on hundreds of tensor-parallel and data-parallel ranks with real
arithmetic, each rank a thread, and compare with one process.

    python -m tests.campaigns.threaded_ranks --world-size 256 --tensor-model-parallel-size 8
    python -m tests.campaigns.threaded_ranks --world-size 256 --expert-parallel-size 64
"""

import argparse
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from megatron_interbert.data.packing import PackedBatch, pack
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import is_expert, place_of, shard
from megatron_interbert.model.presets import with_experts
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.virtual.samples import random_examples
from tests.sizes import SMALL

SIZES = dataclasses.replace(
    SMALL,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=16,
    image_attention_heads=16,
    initializer_range=0.1,
).without_dropout()
TOLERANCE = 1e-9  # of float64, relative to the largest of a tensor


def run_in_threads(ranks: int, function: Callable[[int], Any]) -> list[Any]:
    """Call function(rank) on every rank of a process group whose ranks are threads of this process;
    return their results. An exception in one of them is raised here.
    """
    results: list[Any] = [None] * ranks
    failed: list[BaseException] = []
    store = dist.HashStore()

    def one(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = function(rank)
        except BaseException as error:
            failed.append(error)
            ProcessLocalGroup.exception_handle(error)  # wakes the others
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        ProcessLocalGroup.reset()

    if failed:
        raise failed[0]

    return results


def build(state: ParallelState, recompute: bool, experts: int = 0) -> InterBert:
    """Build a rank's slice of the model in float64, with the weights of every layout."""
    sizes = with_experts(SIZES, experts, 2 if experts else 0)
    if experts:
        state.make_expert_groups()
    model = InterBert(
        sizes, state=state, kernels=Kernels(), streams=RandomStreams(0), recompute=recompute
    )
    initialise(model, sizes, 0, state)

    return model.double()


def batch_of(data_rank: int) -> PackedBatch:
    """Return the micro-batch of a data-parallel rank; their sizes differ."""
    samples = 1 + data_rank % 3
    examples = random_examples(SIZES, samples, (5, 12), (1, 9), seed=data_rank)
    batch = pack(examples, SIZES.feature_dim)

    return dataclasses.replace(
        batch, features=batch.features.double(), locations=batch.locations.double()
    )


def totals_of(data_size: int) -> torch.Tensor:
    """Return the targets of all micro-batches of a step, by which losses are divided."""
    return torch.stack([batch_of(rank).target_counts() for rank in range(data_size)]).sum(0)


def one_process(data_size: int, experts: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of all micro-batches, computed one after another."""
    model = build(ParallelState(alone=True), False, experts)
    totals = totals_of(data_size)
    loss = 0.0

    for rank in range(data_size):
        batch = batch_of(rank)
        share = PretrainingTask().loss(model(batch), batch, totals)[0]
        share.backward()
        loss += float(share.detach())

    return loss, {name: p.grad for name, p in model.named_parameters()}


def check(
    ranks: int,
    tensor: int,
    sequence_parallel: bool = False,
    recompute: bool = False,
    expert: int = 0,
) -> float:
    """Compare the loss and every rank's gradients with those of one process; return the largest
    error, relative to the largest value of a tensor.

    `expert`: expert-parallel ranks of a model with two experts on each of them; 0: a dense one.
    """
    expected, gradients = one_process(ranks // tensor, 2 * expert)

    def one_rank(_: int) -> float:
        state = ParallelState(tensor, sequence_parallel, expert_parallel_size=max(expert, 1))
        model = build(state, recompute, 2 * expert)
        batch = batch_of(state.data_rank)
        totals = state.sum_over_data(batch.target_counts())
        loss = PretrainingTask().loss(model(batch), batch, totals)[0]
        loss.backward()
        whole = float(state.sum_over_data(loss.detach().clone()))
        worst = abs(whole / expected - 1)

        for name, parameter in model.named_parameters():
            ours = parameter.grad
            if is_expert(name) and state.experts_apart:
                dist.all_reduce(ours, group=state.expert_data_group)
            else:
                state.sum_over_data(ours)
            theirs = shard(gradients[name], name, *place_of(name, state))
            scale = max(float(gradients[name].abs().max()), 1e-6)
            worst = max(worst, float((ours - theirs).abs().max()) / scale)

        return worst

    with torch.autograd.set_multithreading_enabled(False):
        return max(run_in_threads(ranks, one_rank))


def main() -> None:
    """Run the campaign; exit with code 1 if a rank differs from one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=256)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=8)
    parser.add_argument("--expert-parallel-size", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)

    for split, recompute in itertools.product((False, True), repeat=2):
        started = time.monotonic()
        size = options.tensor_model_parallel_size
        expert = options.expert_parallel_size
        worst = check(options.world_size, size, split, recompute, expert)
        print(
            f"{options.world_size} ranks, TP{size}, EP{expert}, sequence parallel {split},"
            f" recomputation {recompute}: largest error {worst:.1e},"
            f" {time.monotonic() - started:.1f} s",
            flush=True,
        )
        if not worst < TOLERANCE:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
