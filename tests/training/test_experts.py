"""Test that experts give the same losses, gradient norms and weights on every layout, with clipping
and with experts that get no token.

The reference is a plain torch loop in float64 without DeepSpeed, process groups, accumulation or
exchange, whose experts are computed by tests/training/plain_experts.py. `python -m
tests.campaigns.experts` tries all layouts.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from megatron_interbert.data.order import MicroBatches
from megatron_interbert.model import experts
from megatron_interbert.model.routing_groups import RoutingRule, within_capacity
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.optimizer import learning_rate, parameter_groups
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.training.plain_experts import use_plain_experts
from tests.training.test_layouts import BATCH, STEPS, parts, run_config, train

# processes -> (tensor-parallel, expert-parallel size)
LAYOUTS = {
    1: [(1, 1)],
    2: [(1, 1), (1, 2), (2, 1), (2, 2)],
    4: [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4)],
}
EXPERTS = {"experts": 8, "prototypes": 2, "adam_eps": 1e-4}
# samples of 4 partitions, in routing groups of 2
LIMITED = {
    "experts": 8,
    "prototypes": 2,
    "adam_eps": 1e-4,
    "capacity_factor": 1.0,
    "balance_coefficient": 0.1,
    "routing_group": 2,
    "global_batch_size": 16,
}


def all_cases(processes):
    """Return all (tensor, expert, ZeRO stage, accumulation) of so many processes."""
    return [
        (*layout, stage, accumulation)
        for layout, stage, accumulation in itertools.product(LAYOUTS[processes], range(4), (1, 2))
    ]


def reference(store, **experts):
    """Return losses, gradient norms and weights of the plain loop in float64."""
    config = run_config(store, **experts)
    batch_size = config.global_batch_size
    model, data, task = parts(config, ParallelState(), RandomStreams(config.seed))
    model.double()
    use_plain_experts(model, config.capacity_factor)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, eps=config.adam_eps
    )
    found = {"losses": [], "norms": [], "idle": 0, "dropped": 0}

    for step, positions in zip(
        range(1, STEPS + 1), MicroBatches(0, batch_size, batch_size, 0, 1), strict=False
    ):
        batch = data[positions]
        output = model(batch)
        loss, _ = task.loss(output, batch, batch.target_counts())
        groups = batch_size / config.routing_group
        balance = config.balance_coefficient * output.balance.sum() / groups
        (loss + balance).backward()
        found["losses"].append(loss.item())
        found["dropped"] += int(output.router_figures[:, -4].sum())
        found["idle"] += int((output.router_figures[:, :-4] == 0).sum())
        found["norms"].append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        optimizer.step()
        optimizer.zero_grad()

    found["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    return found


def check(store, expected, halves, cases):
    """Compare runs on layouts with the reference, and those in bf16 with bf16 on as many
    tensor-parallel ranks, without expert parallelism.
    """
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    halves = {1: halves}

    for number, (tensor, expert, stage, accumulation) in enumerate(cases):
        state = ParallelState(tensor, tensor > 1 and number % 2 == 1, expert_parallel_size=expert)
        config = run_config(
            store,
            zero_stage=stage,
            micro_batch_size=BATCH // state.data_size // accumulation,
            tensor_model_parallel_size=tensor,
            expert_parallel_size=expert,
            recompute_activations=number % 3 == 2,
            **EXPERTS,
        )
        case = f"TP{tensor} EP{expert} ZeRO-{stage} accumulation {accumulation}"
        compare(train(config, state), expected, case)

        if stage and accumulation == 1:
            half = train(dataclasses.replace(config, bf16=True), state)
            undivided = halves.setdefault(tensor, half)
            compare_figures(half, undivided, f"{case} bf16", loss=0.01, norm=0.05)
            if number % 2 == 0:
                check_other_precisions(config, state, half, case)


def check_other_precisions(config, state, half, case):
    """Compare runs with float8 products, and in fp16 where that can be computed, with bf16."""
    from megatron_interbert.training.engine import half_precision_supported

    eight = train(dataclasses.replace(config, bf16=True, fp8=True), state)
    assert eight["losses"] != half["losses"]
    compare_figures(eight, half, f"{case} fp8", loss=0.02, norm=0.1)

    if half_precision_supported():
        file = Path(config.data_path).with_name("fp16.json")
        scaled = dataclasses.replace(config, fp16=True, deepspeed_config=str(file))
        compare_figures(train(scaled, state), half, f"{case} fp16", loss=0.01, norm=0.05)


def compare_figures(result, expected, case, loss, norm):
    """Compare losses and norms within relative tolerances."""
    for kind, tolerance in (("losses", loss), ("norms", norm)):
        for ours, theirs in zip(result[kind], expected[kind], strict=True):
            assert abs(ours - theirs) <= tolerance * theirs, (case, kind, ours, theirs)


def compare(result, expected, case):
    compare_figures(result, expected, case, loss=1e-6, norm=1e-6)

    for name, theirs in expected["weights"].items():
        worst = (result["weights"][name].double() - theirs).abs().max().item()
        assert worst <= 1e-6, (case, name, worst)


def bf16_of_one_process(store, file):
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    config = run_config(store, zero_stage=1, bf16=True, **EXPERTS)
    result = train(config, ParallelState())
    torch.save({kind: result[kind] for kind in ("losses", "norms")}, file)


def expected_of(folder):
    """Return the store, and the results of the plain loop and of one process in bf16."""
    store = str(write_store(folder / "store"))
    # a loss scale that does not overflow, so no step is skipped
    (folder / "fp16.json").write_text('{"fp16": {"initial_scale_power": 8}}')
    run_on_ranks(1, bf16_of_one_process, store, str(folder / "bf16.pt"))

    return store, reference(store, **EXPERTS), torch.load(folder / "bf16.pt")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return expected_of(tmp_path_factory.mktemp("experts"))


def test_the_reference_clips_and_has_idle_experts(expected):
    assert min(expected[1]["norms"]) > 1.0
    assert expected[1]["idle"] > 0


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_layouts_agree_with_a_plain_loop(expected, processes):
    every = {1: 1, 2: 3, 4: 5}[processes]
    run_on_ranks(processes, check, *expected, all_cases(processes)[::every])


def check_settings(store, expected, settings, cases):
    """Compare runs with certain settings on layouts of several sizes with the reference."""
    from megatron_interbert.machines.processes import start_processes

    start_processes()

    for tensor, expert, stage, accumulation in cases:
        state = ParallelState(tensor, tensor > 1, expert_parallel_size=expert)
        samples = settings.get("global_batch_size", BATCH)
        config = run_config(
            store,
            zero_stage=stage,
            micro_batch_size=samples // state.data_size // accumulation,
            tensor_model_parallel_size=tensor,
            expert_parallel_size=expert,
            recompute_activations=stage == 3,
            **settings,
        )
        config.data_parallel_size = state.data_size
        config.check_routing_groups()
        case = f"TP{tensor} EP{expert} ZeRO-{stage} accumulation {accumulation}"
        compare(train(config, state), expected, case)


def test_capacity_and_balance_agree_with_a_plain_loop(expected):
    store = expected[0]
    wanted = reference(store, **LIMITED)
    assert wanted["dropped"] > 10
    cases = ((1, 4, 1, 2), (1, 2, 3, 1), (2, 4, 2, 2))
    run_on_ranks(4, check_settings, store, wanted, LIMITED, cases)


def test_shared_layers_agree_with_a_plain_loop(expected):
    store = expected[0]
    shared = {**EXPERTS, "share_layers": True}
    cases = ((1, 2, 0, 1), (2, 1, 1, 1), (1, 1, 2, 2), (2, 2, 3, 1))
    run_on_ranks(2, check_settings, store, reference(store, **shared), shared, cases)


class Watched:
    """Record which tokens each layer drops, by the position of their sample in the data."""

    def __init__(self, monkeypatch):
        self.dropped = set()
        self.tokens = 0
        self.layer = 0
        monkeypatch.setattr(experts, "within_capacity", self.within_capacity)

    def start(self, batch, positions, layers):
        """Begin a pass over a batch through stacks of so many layers."""
        self.positions = positions
        offsets = (batch.joint_offsets, batch.text_offsets, batch.image_offsets)
        self.offsets = [of for of, depth in zip(offsets, layers, strict=True) for _ in range(depth)]
        self.layer = 0

    def within_capacity(self, expert, groups, count):
        fits = within_capacity(expert, groups, count)
        offsets = self.offsets[self.layer].long()
        sample = torch.searchsorted(offsets, groups.position, right=True) - 1
        place = groups.position - offsets[sample]
        real = int((groups.of_row < groups.count).sum())

        for row, prototype in (~fits[:real]).nonzero().tolist():
            where = (self.positions[sample[row]], int(place[row]), prototype)
            self.dropped.add((self.layer, *where))

        self.tokens += real
        self.layer += 1

        return fits


def test_dropped_tokens_do_not_depend_on_the_layout(expected, monkeypatch):
    """Route one global batch as 1, 2 and 4 data-parallel ranks do, in two micro-batch sizes."""
    config = run_config(expected[0], **LIMITED)
    found = {}

    for ranks, passes in itertools.product((1, 2, 4), (1, 2)):
        model, data, _ = parts(config, ParallelState(), RandomStreams(config.seed))
        rule = RoutingRule(1.0, True, group=2, partitions=4 // ranks)
        for module in model.modules():
            if hasattr(module, "rule"):
                module.rule = rule

        watched = Watched(monkeypatch)
        balance = 0.0
        for rank in range(ranks):
            stream = iter(MicroBatches(0, 16, 16 // ranks // passes, rank, ranks))
            for _ in range(passes):
                positions = next(stream)
                batch = data[positions]
                sizes = model.config
                layers = (sizes.interaction_layers, sizes.text_layers, sizes.image_layers)
                watched.start(batch, positions, layers)
                balance += model(batch).balance.sum().item()

        found[ranks, passes] = watched.dropped, watched.tokens, balance

    dropped, tokens, balance = found[1, 1]
    assert 10 < len(dropped) < tokens
    for layout, result in found.items():
        assert result[0] == dropped, layout
        assert result[1] == tokens, layout
        assert result[2] == pytest.approx(balance, rel=1e-6), layout
