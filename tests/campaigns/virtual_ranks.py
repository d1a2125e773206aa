"""Build DeepSpeed's real engine on every one of many virtual ranks, and check that together they
save each element of weights and moments exactly once.

    python -m tests.campaigns.virtual_ranks --world-size 512 --tensor-model-parallel-size 8
    python -m tests.campaigns.virtual_ranks --world-size 512 --model m6-100b \\
        --expert-parallel-size 64

The small model of the first command has real tensors, presets have shapes only.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import time
from importlib import import_module
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.machines.processes import quiet_libraries
from megatron_interbert.model.presets import PRESETS, with_experts, with_usual_data
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.progress import progress
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import FragmentedState, Outline
from megatron_interbert.training.model_plan import ModelPlan, build_model
from megatron_interbert.virtual.comparison import missing_or_double
from megatron_interbert.virtual.rank import HERE, VirtualState, one_of, without_values
from tests.sizes import FOR_EIGHT_RANKS

SIZES = dataclasses.replace(FOR_EIGHT_RANKS, num_attention_heads=8)
UTILS = "deepspeed.runtime.zero.utils"


def outlines_of(
    ranks: int, tensor: int, stage: int, expert: int = 0, model: str = ""
) -> tuple[dict[tuple[int, int], list[Outline]], dict[str, tuple[int, ...]]]:
    """Build the engine of each of `ranks` in turn; return what each saves, by (tensor rank, data
    rank), and the shapes of a slice.

    The small model has two experts on each of `expert` ranks, or none. A process builds a few
    engines only: DeepSpeed's get slower with their number.
    """
    import_module("torch._dynamo")  # what all ranks need, before processes are forked
    if model:
        with without_values():
            torch.zeros(1) + 1
    tasks = [(ranks, tensor, stage, expert, model, rank) for rank in range(ranks)]
    context = multiprocessing.get_context("fork")

    with context.Pool(maxtasksperchild=8) as pool:
        results = pool.imap(outline_of, tasks)
        found = list(progress(results, total=ranks, desc=f"ZeRO-{stage}", unit="rank"))

    return {place: outline for place, outline, _ in found}, found[0][2]


def outline_of(
    task: tuple[int, int, int, int, str, int],
) -> tuple[tuple[int, int], list[Outline], dict[str, tuple[int, ...]]]:
    """Build the engine of one rank; return its place, what it saves, and the shapes of its
    slice.
    """
    ranks, tensor, stage, expert, name, rank = task
    sizes = with_experts(SIZES, 2 * expert)
    if name:
        sizes, _ = with_usual_data(PRESETS[name])
    deepspeed.accelerator.set_accelerator(CPU_Accelerator())
    torch.set_num_threads(1)

    with (
        one_of(ranks, rank),
        without_values() if name else contextlib.nullcontext(),
        mock.patch(f"{UTILS}.assert_lst_len_same_as_other_ranks"),
        mock.patch(f"{UTILS}.get_lst_from_rank0", side_effect=list),
    ):
        state = VirtualState(tensor, expert_parallel_size=max(expert, 1))
        if sizes.experts:
            state.make_expert_groups()
        config = RunConfig(
            micro_batch_size=1,
            bf16=True,
            zero_stage=stage,
            tensor_model_parallel_size=tensor,
            expert_parallel_size=max(expert, 1),
        )
        job = Job(None, None, sizes, ("msm", "mrm", "itm"), {}, "")
        plan = ModelPlan(job, state, Kernels(), 0, recompute=False)
        model = build_model(plan, config, RandomStreams(0), HERE)
        if name:
            model.to = lambda *_, **__: model  # fake parameters cannot be moved, nor need to be
        outline = FragmentedState(Engine(model, config, state)).outline()
        names = plan.without_memory().named_parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in names}

        return (state.tensor_rank, state.data_rank), outline, shapes


def main() -> None:
    """Run the campaign; exit with code 1 if an element is missing or double."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=512)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=8)
    parser.add_argument("--expert-parallel-size", type=int, default=0)
    parser.add_argument("--model", default="", choices=["", *PRESETS])
    parser.add_argument("--stages", default="1,2,3")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)

    for stage in map(int, options.stages.split(",")):
        started = time.monotonic()
        layout = (options.tensor_model_parallel_size, stage, options.expert_parallel_size)
        found = outlines_of(options.world_size, *layout, options.model)
        problem = missing_or_double(*found)
        runs = sum(map(len, found[0].values()))
        seconds = time.monotonic() - started
        print(f"ZeRO-{stage}: {runs} runs of {options.world_size} ranks, {seconds:.0f} s:", end=" ")
        print(problem or "each element once", flush=True)
        if problem:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
