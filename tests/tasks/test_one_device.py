"""Test that training steps keep to one device and never wait for it: on the meta device each of the
field's tasks and objectives runs forward, loss and backward. An operation that needs the content of
a tensor on the host fails there; one that mixes devices is noticed by the test.
"""

import sys

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_interbert.command_line import parse_task
from megatron_interbert.data.packing import to_batch
from megatron_interbert.model.construction import on_meta
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.sample.corpus import World
from megatron_interbert.sample.tasks.world import write_world
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.registry import FINETUNED
from tests.tasks.objective_twins import SAMPLES, make_model, samples_of, settings
from tests.training.test_field_tasks import training_flags

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Fail at an operation on tensors of several devices; a CPU number may stand beside any."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
        assert len(devices) < 2, f"{func} with tensors on {devices}"

        return func(*args, **(kwargs or {}))


def step(model, task, batch):
    """Run a step without content; return the gradients of the model."""
    totals = task.count_targets(batch).to(META)
    batch = batch.to(META)

    with OneDevice():
        loss, report = task.loss(model(batch), batch, totals)
        assert loss.device == report.device == META
        loss.backward()

    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_mixed_devices_are_noticed():
    table, rows = torch.zeros(3, 2, device=META), torch.tensor([0])
    assert table[rows].device == META  # torch itself says nothing

    with OneDevice(), pytest.raises(AssertionError, match="index"):
        table[rows]


def test_field_tasks_keep_to_one_device(tmp_path, monkeypatch):
    world = tmp_path / "world"
    write_world(World(0, 0.3), world, {"train": 40, "test": 12}, 0)
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(yaml.safe_dump(training_flags(world)))
    flags = ("multitask", "--model", "tiny", "--task-flags", str(tasks), "--save", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["finetune", *flags])
    config, make_job = parse_task(FINETUNED, "")
    job = make_job(config, ParallelState())
    assert len(job.samples.names) == 10

    for number, name in enumerate(job.samples.names):
        model = on_meta(lambda: InterBert(job.model_config, job.heads, **job.model_options))
        batch = to_batch(job.samples.fields([(number, 0, sample) for sample in range(4)]))
        assert any(f"task_heads.{name}." in key for key in step(model, job.task, batch))


@pytest.mark.parametrize("mix", ["", "msm:1,mrm:1,mrc:1,attributes:1,mrfr:1,itm:1"])
def test_objectives_keep_to_one_device(asked_store, mix):
    objectives = "msm,mrm,mrc,attributes,mrfr,itm,vqa,wra"
    config = settings(asked_store, objectives, objective_mix=mix)
    samples = samples_of(config)
    seen = set()

    for start in range(0, 30 * SAMPLES, SAMPLES):
        pairs = samples.order.pairs(range(start, start + SAMPLES), start)
        batch = to_batch(samples.fields(pairs))
        if batch.head not in seen:
            assert step(make_model(config).to(META), PretrainingTask(config), batch)
        seen.add(batch.head)

    assert seen == ({part.partition(":")[0] for part in mix.split(",")} if mix else {""})
