"""Test that the same global batches give the same losses, gradient norms and weights on every
layout, at every ZeRO stage and with gradient accumulation.

The reference is a plain torch loop in float64 without DeepSpeed, process groups or accumulation.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.order import MicroBatches
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import is_expert, partition_dimension, place_of, unshard
from megatron_interbert.model.presets import PRESETS, fit_to_data, with_experts
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.training.model_plan import routing_rule
from megatron_interbert.training.optimizer import learning_rate, parameter_groups
from megatron_interbert.training.routing_health import RoutingHealth
from tests.corpus import write_store
from tests.dist import run_on_ranks

BATCH = 8
STEPS = 3
# processes -> (tensor-parallel sizes, micro-batches of a step)
LAYOUTS = {1: ([1], [1, 2]), 2: ([1, 2], [1, 2]), 4: ([2], [2])}


def run_config(store, **changes):
    config = RunConfig(
        model="tiny",
        data_path=str(store),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        train_iters=STEPS,
        lr=1e-3,
        data_partitions=4,
        num_workers=0,
        clip_grad=1.0,
        dropout=False,
    )
    config = dataclasses.replace(config, **changes)
    config.given.add("data_partitions")

    return config


def parts(config, state, streams):
    store = Corpus([config.data_path])
    tokenizer = CaptionTokenizer(config.data_path + "/vocab.txt")
    tiny = with_experts(PRESETS["tiny"], config.experts, config.prototypes, config.share_layers)
    sizes = fit_to_data(tiny, tokenizer.vocab_size, store.feature_dim, store.num_classes, "test")
    sizes = sizes if config.dropout else sizes.without_dropout()
    kernels = choose_kernels("torch", torch.device("cpu"), fp8=config.fp8)
    if sizes.experts:
        state.make_expert_groups()
    model = InterBert(
        sizes,
        state=state,
        kernels=kernels,
        streams=streams,
        recompute=config.recompute_activations,
        rule=routing_rule(config, sizes, state),
    )
    initialise(model, sizes, config.seed, state)

    return model, PretrainingSet(store, tokenizer, config), PretrainingTask()


def reference(store):
    """Return losses, gradient norms and weights of the plain loop in float64."""
    config = run_config(store)
    model, data, task = parts(config, ParallelState(), RandomStreams(config.seed))
    model.double()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)
    losses = []
    norms = []

    for step, positions in zip(
        range(1, STEPS + 1), MicroBatches(0, BATCH, BATCH, 0, 1), strict=False
    ):
        batch = data[positions]
        loss, _ = task.loss(model(batch), batch, batch.target_counts())
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        optimizer.step()
        optimizer.zero_grad()

    batch = data[list(range(BATCH))]
    again = task.loss(model(batch), batch, batch.target_counts())[0].item()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}

    return {"losses": losses, "norms": norms, "weights": weights, "first_batch_again": again}


def train(config, state):
    """Train the same steps through the engine; the weights returned are whole, not sharded."""
    import deepspeed

    from megatron_interbert.training.engine import Engine

    streams = RandomStreams(config.seed, state.data_rank, state.tensor_rank)
    model, data, task = parts(config, state, streams)
    engine = Engine(model, config, state)
    sizes = (config.global_batch_size, config.micro_batch_size)
    stream = iter(MicroBatches(0, *sizes, state.data_rank, state.data_size))
    routing = RoutingHealth(config, model.config, state)
    result = {"losses": [], "norms": [], "report": torch.zeros(3, 3)}

    for step in range(1, STEPS + 1):
        streams.start_step(step)
        batches = [data[next(stream)] for _ in range(engine.accumulation)]
        totals = state.sum_over_data(torch.stack([b.target_counts() for b in batches]).sum(0))
        total = torch.zeros(1)

        for number, batch in enumerate(batches):
            output = engine.forward(batch)
            loss, report = task.loss(output, batch, totals)
            total += loss.detach()
            engine.backward(loss + routing.loss(output), last=number == len(batches) - 1)
            result["report"] += report

        result["losses"].append(float(state.sum_over_data(total)))
        result["norms"].append(engine.step(learning_rate(step, config))[0])

    local = {}
    for name, parameter in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=config.zero_stage == 3):
            local[name] = parameter.detach().float().clone()

    result["local"] = local
    result["routing"] = routing.metrics(STEPS)
    result["weights"] = {name: gather(tensor, name, state) for name, tensor in local.items()}

    return result


def gather(tensor, name, state):
    ranks = place_of(name, state)[1]
    if ranks == 1 or partition_dimension(name) is None:
        return tensor
    shards = [torch.empty_like(tensor) for _ in range(ranks)]
    group = state.expert_group if is_expert(name) else state.tensor_group
    torch.distributed.all_gather(shards, tensor.contiguous(), group=group)
    return unshard(shards, name)


def check_all(store, expected, processes):
    """Check every ZeRO stage, accumulation and precision on the layouts of so many processes."""
    from megatron_interbert.machines.processes import start_processes
    from megatron_interbert.training.engine import half_precision_supported

    start_processes()
    # a loss scale that does not overflow, so no step is skipped
    Path("fp16.json").write_text('{"fp16": {"initial_scale_power": 8}}')

    tensor_sizes, micro_batches = LAYOUTS[processes]

    for tensor_parallel, stage, accumulation in itertools.product(
        tensor_sizes, range(4), micro_batches
    ):
        state = ParallelState(tensor_parallel)
        micro = BATCH // state.data_size // accumulation
        case = f"DP{state.data_size} TP{tensor_parallel} ZeRO-{stage} accumulation {accumulation}"
        config = run_config(
            store,
            zero_stage=stage,
            micro_batch_size=micro,
            tensor_model_parallel_size=tensor_parallel,
        )
        compare(train(config, state), expected, case, loss=1e-4, norm=1e-4, weight=2e-5)
        shared = ParallelState(tensor_parallel, sequence_parallel=tensor_parallel > 1)

        if tensor_parallel > 1 and accumulation == 2:
            compare(
                train(config, shared),
                expected,
                case + " sequence parallel",
                loss=1e-4,
                norm=1e-4,
                weight=2e-5,
            )

        if accumulation == micro_batches[0] and stage >= 1:
            half = train(dataclasses.replace(config, bf16=True), state)
            compare(half, expected, case + " bf16", loss=0.02, norm=0.1, weight=None)
            eight = train(
                dataclasses.replace(config, bf16=True, fp8=True), state if stage == 1 else shared
            )
            compare(eight, expected, case + " fp8", loss=0.02, norm=0.1, weight=None)

            if half_precision_supported():
                half = train(
                    dataclasses.replace(config, fp16=True, deepspeed_config="fp16.json"), state
                )
                compare(half, expected, case + " fp16", loss=0.01, norm=0.05, weight=None)
            else:
                print(f"{case} fp16: SKIPPED, this processor cannot compute in float16")

    state = ParallelState(tensor_sizes[-1])
    check_dropout(store, state)
    if state.tensor_size > 1:
        check_dropout(store, ParallelState(state.tensor_size, sequence_parallel=True))

    check_bad_steps(store, state)
    if processes < 4:
        check_parameters_that_do_not_stay(store, expected)
    if processes == 2:
        check_templates(store, expected)


def check_parameters_that_do_not_stay(store, expected):
    """Check ZeRO-3 with a persistence threshold of 0: it must then gather even small parameters,
    including the tied embedding.
    """
    Path("zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )

    for tensor_parallel in {1, min(2, torch.distributed.get_world_size())}:
        state = ParallelState(tensor_parallel)
        config = run_config(
            store,
            deepspeed_config="zero3.json",
            micro_batch_size=BATCH // state.data_size,
            tensor_model_parallel_size=tensor_parallel,
        )

        compare(
            train(config, state),
            expected,
            f"ZeRO-3 without persistence TP{tensor_parallel}",
            loss=1e-4,
            norm=1e-4,
            weight=2e-5,
        )
        recomputing = dataclasses.replace(config, recompute_activations=True)
        compare(
            train(recomputing, state),
            expected,
            "ZeRO-3 recomputing",
            loss=1e-4,
            norm=1e-4,
            weight=2e-5,
        )
        eight = train(dataclasses.replace(recomputing, bf16=True, fp8=True), state)
        compare(eight, expected, "ZeRO-3 recomputing fp8", loss=0.02, norm=0.1, weight=None)


def check_templates(store, expected):
    """Check that every shipped DeepSpeed JSON, with offload too, trains with the same losses;
    tests/training/test_swap.py has those for NVMe, which need a larger model.
    """
    for template in sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json")):
        if "nvme" in template.stem:
            continue

        config = run_config(store, deepspeed_config=str(template), micro_batch_size=BATCH // 2)
        config.given = {"micro_batch_size", "global_batch_size"}
        compare(
            train(config, ParallelState(1)),
            expected,
            template.name,
            loss=1e-4,
            norm=1e-4,
            weight=None,
        )


def check_bad_steps(store, state):
    """Check at every stage and precision that no rank updates after a batch that gives NaN on one
    rank, and that all do at the next good step.

    With fp16 an overflow also halves the loss scale.
    """
    from megatron_interbert.training.engine import Engine, half_precision_supported

    cases = (
        [(stage, "fp32") for stage in range(4)]
        + [(stage, "bf16") for stage in (1, 2, 3)]
        + [(stage, "fp16") for stage in (1, 2, 3) if half_precision_supported()]
    )
    for stage, precision in cases:
        config = run_config(
            store,
            zero_stage=stage,
            micro_batch_size=BATCH // state.data_size,
            tensor_model_parallel_size=state.tensor_size,
            fp16=precision == "fp16",
            bf16=precision == "bf16",
        )
        streams = RandomStreams(config.seed, state.data_rank, state.tensor_rank)
        model, data, task = parts(config, state, streams)
        engine = Engine(model, config, state)
        scale = engine.loss_scale()
        outcomes = []
        weights = [whole_weights(engine)]

        for spoiled in (True, False, True, False):
            batch = data[list(range(state.data_rank, BATCH, state.data_size))]
            if spoiled and state.data_rank == state.data_size - 1:
                batch.features = batch.features.clone().fill_(float("nan"))

            loss, _ = task.loss(
                engine.forward(batch), batch, state.sum_over_data(batch.target_counts())
            )
            engine.backward(loss, last=True)
            outcomes.append(engine.step(1e-3)[1])
            weights.append(whole_weights(engine))

        case = f"ZeRO-{stage} {precision} TP{state.tensor_size} DP{state.data_size}"
        assert outcomes[0] is False, case
        assert outcomes[2] is False, case
        assert torch.equal(weights[0], weights[1]), case
        assert torch.equal(weights[2], weights[3]), case
        assert torch.isfinite(weights[4]).all(), case

        if precision == "fp16":
            assert engine.loss_scale() < scale, case
        else:
            assert outcomes == [False, True, False, True], case
            assert not torch.equal(weights[3], weights[4]), case


def whole_weights(engine):
    import deepspeed

    flat = []
    for parameter in engine.model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.config.zero_stage == 3):
            flat.append(parameter.detach().float().flatten().clone())

    return torch.cat(flat)


def compare(result, expected, case, loss, norm, weight):
    # Losses and norms are compared by relative difference.
    for kind, tolerance in (("losses", loss), ("norms", norm)):
        torch.testing.assert_close(
            torch.tensor(result[kind]),
            torch.tensor(expected[kind]).float(),
            rtol=tolerance,
            atol=1e-5,
            msg=lambda m, k=kind: f"{case} {k}: {m}",
        )

    if weight is None:
        return
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(
            without_key_bias(name, result["weights"][name]),
            without_key_bias(name, tensor).float(),
            rtol=1e-4,
            atol=weight,
            msg=lambda m, n=name: f"{case} {n}: {m}",
        )


def without_key_bias(name, tensor):
    """Drop key biases: their gradients are only rounding, which Adam scales to full steps."""
    return (
        tensor.view(PRESETS["tiny"].num_attention_heads, 3, -1)[:, [0, 2]]
        if name.endswith("qkv.bias")
        else tensor
    )


def check_dropout(store, state):
    """Check with dropout that recomputation does not change losses, and that replicated parameters
    stay equal to the bit on all tensor-parallel ranks.
    """
    config = run_config(
        store,
        dropout=True,
        zero_stage=2,
        micro_batch_size=BATCH // state.data_size,
        tensor_model_parallel_size=state.tensor_size,
    )
    plain = train(config, state)
    again = train(dataclasses.replace(config, recompute_activations=True), state)
    assert plain["losses"] == again["losses"], "recomputation must replay dropout exactly"
    if state.tensor_size == 1:
        return
    for name, tensor in plain["local"].items():
        if partition_dimension(name) is None:
            shards = [torch.empty_like(tensor) for _ in range(state.tensor_size)]
            torch.distributed.all_gather(shards, tensor.contiguous(), group=state.tensor_group)
            assert all(torch.equal(shards[0], s) for s in shards), name


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("layouts") / "store")
    return str(store), reference(str(store))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_layouts_agree_with_a_plain_loop(expected, processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_on_ranks(processes, check_all, *expected, processes)


def test_reference_learns(expected):
    """Compare losses on the first step's batch: different small batches differ by more than a few
    steps gain.
    """
    assert expected[1]["first_batch_again"] < expected[1]["losses"][0] - 0.1
