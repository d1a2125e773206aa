"""Test that a checkpoint of any layout resumes on any other: losses and norms as in the
uninterrupted run, weights and moments bit for bit.

Layouts are {DP2, TP2, DP2 x TP2} x ZeRO {1, 2, 3}, stage 0, one process and TP4. Each resumes from
every fifth of the others, so that every stage is source and target of every stage; `python -m
tests.campaigns.topologies` tries all pairs.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_interbert.model.partition import full_shape, is_expert, place_of, shard
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.shared import needs_half_precision
from tests.training.test_layouts import BATCH, parts, run_config

SAVED = 3
LAST = 5
LAYOUTS = {  # processes -> (tensor parallel, ZeRO stage)
    1: [(1, 0)],
    2: [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)],
    4: [(2, 1), (2, 2), (2, 3), (4, 1)],
}
ALL = [
    f"dp{ranks // tensor}-tp{tensor}-zero{stage}"
    for ranks, layouts in LAYOUTS.items()
    for tensor, stage in layouts
]


def start():
    """Set up this process as a launched rank; return the number of ranks."""
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    return ParallelState().world_size


class Run:
    """Train through the engine; the run can be saved and resumed at any step."""

    def __init__(self, store, folder, tensor, stage, load="", expert=1, **changes):
        from megatron_interbert.training.checkpoint import Checkpoints, Progress
        from megatron_interbert.training.engine import Engine

        self.state = ParallelState(tensor, expert_parallel_size=expert)
        if stage == 3:
            changes.setdefault("deepspeed_config", f"{Path(store).parent}/zero3.json")

        settings = {
            "tensor_model_parallel_size": tensor,
            "expert_parallel_size": expert,
            "zero_stage": stage,
            "micro_batch_size": 2,
            "save": str(folder),
        }
        self.config = run_config(store, train_iters=LAST, **settings, **changes)
        self.streams = RandomStreams(self.config.seed, self.state.data_rank, self.state.tensor_rank)
        model, self.data, self.task = parts(self.config, self.state, self.streams)
        self.sizes = model.config
        self.engine = Engine(model, self.config, self.state)
        described = {"store": store, "manifest_sha256": "s", "vocabulary": "v", "detector": {}}
        self.checkpoints = Checkpoints(
            self.config, self.sizes, self.state, described, f"{store}/vocab.txt"
        )
        self.progress = self.checkpoints.load(self.engine, Path(load)) if load else Progress()

    def train(self, last):
        """Train up to step `last`; return {step: (loss, gradient norm)}."""
        from megatron_interbert.data.order import MicroBatches
        from megatron_interbert.training.optimizer import learning_rate

        stream = iter(
            MicroBatches(
                self.progress.consumed_samples, BATCH, 2, self.state.data_rank, self.state.data_size
            )
        )
        results = {}

        for step in range(self.progress.step + 1, last + 1):
            self.streams.start_step(step)
            batches = [self.data[next(stream)] for _ in range(self.engine.accumulation)]
            totals = self.state.sum_over_data(
                torch.stack([b.target_counts() for b in batches]).sum(0)
            )
            total = torch.zeros(1)

            for number, batch in enumerate(batches):
                loss, _ = self.task.loss(self.engine.forward(batch), batch, totals)
                self.engine.backward(loss, last=number == len(batches) - 1)
                total += loss.detach()

            norm = self.engine.step(learning_rate(step, self.config))[0]
            results[step] = (float(self.state.sum_over_data(total)), norm)
            self.progress.step = step
            self.progress.consumed_samples = self.progress.consumed_samples + BATCH

        return results

    def save(self):
        """Save a checkpoint and wait until it is committed."""
        self.checkpoints.save(self.engine, self.progress)
        self.checkpoints.wait()


def make_checkpoints(store, folder):
    """Train three steps on each layout of this world size, save, and train on to the end."""
    ranks = start()
    for tensor, stage in LAYOUTS[ranks]:
        name = f"dp{ranks // tensor}-tp{tensor}-zero{stage}"
        run = Run(store, f"{folder}/{name}", tensor, stage)
        run.train(SAVED)
        run.save()
        undisturbed = run.train(LAST)
        if run.state.is_main:
            Path(f"{folder}/{name}.json").write_text(json.dumps(undisturbed))


def resume_everywhere(store, folder, every):
    """Resume each layout of this world size from every `every`-th of all checkpoints."""
    from megatron_interbert.training.fragments import FragmentedState
    from megatron_interbert.weights.reader import CheckpointReader

    ranks = start()
    expected = {name: json.loads(Path(f"{folder}/{name}.json").read_text()) for name in ALL}

    for tensor, stage in LAYOUTS[ranks]:
        target = f"dp{ranks // tensor}-tp{tensor}-zero{stage}"
        for number, source in enumerate(ALL):
            if (number + ALL.index(target)) % every:
                continue

            path = Path(folder, source, f"global_step{SAVED}")
            run = Run(store, f"{folder}/resumed", tensor, stage, load=path)
            where = f"{source} -> {target}"
            assert (run.progress.step, run.progress.consumed_samples) == (SAVED, SAVED * BATCH)
            check_every_bit(CheckpointReader(path), FragmentedState(run.engine), run.state, where)

            for step, (loss, norm) in run.train(LAST).items():
                theirs = expected[source][str(step)]
                assert abs(loss - theirs[0]) < 2e-5 * abs(theirs[0]), (where, step, loss, theirs[0])
                assert abs(norm - theirs[1]) < 2e-4 * abs(theirs[1]), (where, step, norm, theirs[1])


def offload(store, folder):
    """Check offload to the host: resume from, and into, a layout that keeps state on the device."""
    start()
    templates = Path(__file__).resolve().parents[2] / "ds_configs"
    expected = json.loads(Path(f"{folder}/dp2-tp1-zero3.json").read_text())
    path = Path(folder, "dp2-tp1-zero3", f"global_step{SAVED}")

    for stage, template in ((2, "zero2_offload_optimizer.json"), (3, "zero3_offload.json")):
        run = Run(
            store,
            f"{folder}/{template}",
            1,
            stage,
            load=path,
            deepspeed_config=str(templates / template),
        )
        losses = run.train(SAVED + 1)
        run.save()
        again = Run(
            store, f"{folder}/x", 1, 1, load=Path(folder, template, f"global_step{SAVED + 1}")
        )
        losses |= again.train(LAST)
        for step, (loss, norm) in losses.items():
            assert abs(loss - expected[str(step)][0]) < 2e-5 * abs(loss), (template, step)
            assert abs(norm - expected[str(step)][1]) < 2e-4 * abs(norm), (template, step)


def check_every_bit(reader, training_state, state, where):
    """Compare what each rank holds after loading with a plain slice of the full tensors."""
    assert training_state.scalars()["adam_step"] == SAVED
    seen = 0

    for fragment in training_state.held():
        for kind, tensor in fragment.tensors.items():
            full = reader.get(fragment.name, kind)
            rank, ranks = place_of(fragment.name, state)
            assert list(full.shape) == full_shape(fragment.name, fragment.shape, ranks)
            mine = shard(full, fragment.name, rank, ranks).reshape(-1)
            assert torch.equal(tensor, mine[fragment.start : fragment.start + fragment.length]), (
                where,
                fragment.name,
                kind,
            )
            seen += tensor.numel()

    assert seen > 0, where


def write_corpus(folder):
    """Write the configurations and the store for the runs; return (region store, folder)."""
    # ZeRO-3 with both kinds of parameters: partitioned, and kept whole on every rank.
    (folder / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}'
    )
    (folder / "fp16.json").write_text(
        '{"fp16": {"initial_scale_power": 9, "loss_scale_window": 2}}'
    )

    return str(write_store(folder / "store")), str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("topologies"))


def check_layouts(store, folder, every):
    """Make checkpoints on all layouts, and resume from them on others."""
    for ranks in LAYOUTS:
        run_on_ranks(ranks, make_checkpoints, store, folder)
    for ranks in LAYOUTS:
        run_on_ranks(ranks, resume_everywhere, store, folder, every)


def test_layouts_resume_from_one_another(corpus):
    store, folder = corpus
    check_layouts(store, folder, every=7)
    run_on_ranks(1, offload, store, folder)


def change_precision(store, folder):
    """Check that fp16, with its loss scale restored, and bf16 and fp32 resume from an fp16
    checkpoint.
    """
    from megatron_interbert.training.fragments import FragmentedState

    start()
    half = {"fp16": True, "deepspeed_config": f"{folder}/fp16.json"}
    source = Run(store, f"{folder}/fp16", 1, 2, **half)
    source.train(SAVED)
    source.save()
    scale = source.engine.loss_scale()
    assert scale != 2**9, "the window of 2 steps has changed it"
    path = f"{folder}/fp16/global_step{SAVED}"
    again = Run(store, f"{folder}/x", 1, 2, load=path, **half)
    assert again.engine.loss_scale() == scale
    whole = source.train(LAST)
    assert again.train(LAST) == whole, "the same layout: bit for bit, growth of the scale included"

    for changes in ({"bf16": True}, {}):
        other = Run(store, f"{folder}/x", 2, 1, load=path, **changes)
        assert FragmentedState(other.engine).scalars()["adam_step"] == SAVED
        for step, (loss, _) in other.train(LAST).items():
            assert abs(loss - whole[step][0]) < 0.02 * abs(loss), (changes, step)


@needs_half_precision()
def test_precisions(corpus):
    run_on_ranks(2, change_precision, *corpus)


# (tensor parallel, ZeRO stage): WholeUpdate, PartitionedUpdate, DeepSpeedUpdate
BF16 = ((2, 2), (1, 1), (1, 3))


def change_update(store, folder):
    """Check that runs resume from bf16 runs with any kind of update, and in fp32: weights, moments
    and average are equal to the bit.
    """
    from megatron_interbert.training.fragments import FragmentedState
    from megatron_interbert.weights.reader import CheckpointReader

    start()
    for number, (tensor, stage) in enumerate(BF16):
        source = Run(store, f"{folder}/bf16-{number}", tensor, stage, bf16=True, ema_decay=0.9)
        source.engine.ema.update(1, FragmentedState(source.engine).tensors())
        source.train(SAVED)
        source.engine.ema.update(SAVED, FragmentedState(source.engine).tensors())
        check_whole_copy(source)
        source.save()
        path = Path(folder, f"bf16-{number}", f"global_step{SAVED}")
        undisturbed = source.train(LAST)

        for layout in (*BF16, (2, 0)):
            bf16 = layout[1] > 0
            run = Run(store, f"{folder}/x", *layout, load=path, bf16=bf16, ema_decay=0.9)
            where = f"{tensor, stage} -> {layout}"
            check_every_bit(CheckpointReader(path), FragmentedState(run.engine), run.state, where)
            check_whole_copy(run)
            results = run.train(LAST)
            if layout == (tensor, stage):
                assert results == undisturbed, where
            for step, (loss, norm) in results.items():
                assert abs(loss - undisturbed[step][0]) < 0.01 * loss, (where, step)
                assert abs(norm - undisturbed[step][1]) < 0.05 * norm, (where, step)


def check_whole_copy(run):
    """Check that the evaluation's model gets the fp32 weights, and that the run computes with the
    same, rounded.
    """
    import deepspeed

    from megatron_interbert.training.fragments import FragmentedState

    copy = parts(run.config, run.state.for_evaluation(), run.streams)[0]
    FragmentedState(run.engine).copy_into(copy)
    weights = {name: weight.detach().clone() for name, weight in copy.named_parameters()}
    for name, parameter in run.engine.model.named_parameters():
        mine = weights[name]
        if is_expert(name):
            mine = shard(mine, name, *place_of(name, run.state))
        with deepspeed.zero.GatheredParameters([parameter], enabled=run.config.zero_stage == 3):
            assert torch.equal(mine.to(parameter.dtype), parameter), name

    FragmentedState(run.engine).copy_into(copy, "ema")
    moved = sum(
        not torch.equal(average, weights[name]) for name, average in copy.named_parameters()
    )
    assert moved > 0
    if run.config.zero_stage == 3 and run.state.data_size > 1:
        check_shared_copy(run, weights, "weight")
        check_shared_copy(run, dict(copy.named_parameters()), "ema")


def check_shared_copy(run, whole, kind):
    """Check that an evaluation at stage 3 reads the same from the parts of all ranks."""
    from megatron_interbert.training.evaluation_copy import copy_for_evaluation
    from megatron_interbert.training.fragments import FragmentedState

    model = parts(run.config, run.state.for_evaluation(), run.streams)[0].to("meta")
    shared = copy_for_evaluation(model, run.engine, torch.device("cpu"))
    shared.take(FragmentedState(run.engine), kind)
    names = list(whole)[:: -1 if run.state.data_rank else 1]  # each rank in another order
    assert sum(map(torch.numel, shared.weights.parts.values())) < 0.6 * sum(
        map(torch.numel, whole.values())
    )
    for name in names:
        assert torch.equal(shared.weights.read(name), whole[name]), name

    shared.finish()


def test_every_update_goes_on_from_every_other(corpus):
    run_on_ranks(2, change_update, *corpus)
