"""Test offload to NVMe disks: the same losses as without, saving and resuming from there, and no
loss in silence when a disk is full.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension
from deepspeed.ops.op_builder import AsyncIOBuilder

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import rank_parameters
from megatron_interbert.training import swap
from tests.dist import run_on_ranks
from tests.launching import ends, pretrain, start, until
from tests.sizes import MEASURABLE

SAVED = 2
LAST = 4


def library_is_built() -> bool:
    """Check whether DeepSpeed's I/O library was built with this environment's torch: that takes
    some minutes on all cores, in which other tests would run out of their time.
    """
    folder = Path(torch.utils.cpp_extension._get_build_directory("async_io", verbose=False))
    orders = folder / "build.ninja"
    here = os.path.dirname(torch.__file__)

    return (folder / "async_io.so").is_file() and f"{here}/include" in orders.read_text()


needs_library = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(verbose=False),
    reason="no libaio or compiler (apt-get install libaio-dev g++)",
)
needs_built_library = pytest.mark.skipif(
    not library_is_built(),
    reason="DeepSpeed's I/O library is not built (CONTRIBUTING.md says how, in some minutes)",
)


class Run:
    """Train a small model on random samples through the engine."""

    def __init__(
        self,
        folder: str,
        name: str,
        device: str,
        load: str = "",
        stage: int = 3,
        sizes: ModelConfig = MEASURABLE,
    ) -> None:
        from megatron_interbert.parallel.rng import RandomStreams
        from megatron_interbert.tasks.pretraining.task import PretrainingTask
        from megatron_interbert.tasks.task import Job
        from megatron_interbert.training.checkpoint import Checkpoints, Progress
        from megatron_interbert.training.engine import engine_settings
        from megatron_interbert.training.model_plan import ModelPlan, build_engine
        from megatron_interbert.training.optimizer import elements

        self.sizes = sizes
        self.state = ParallelState()
        self.streams = RandomStreams(0, self.state.data_rank)
        self.task = PretrainingTask()
        self.config = RunConfig(
            micro_batch_size=2,
            bf16=True,
            zero_stage=stage,
            save=f"{folder}/{name}",
            deepspeed_config=f"{folder}/{device}.json",
            nvme_path=f"{folder}/nvme" if device in ("optimizer", "all") else "",
            ema_decay=0.9,
        )
        job = Job(self.task, None, sizes, ("msm", "mrm", "itm"), {}, "")
        plan = ModelPlan(job, self.state, Kernels(), 0, recompute=False)
        names = plan.without_memory()
        settings = engine_settings(self.config, self.state, names)
        settings = swap.prepare_swap(settings, elements(names.parameters()), self.state.data_size)
        device = torch.device("cpu")
        weights = plan.first_weights
        self.engine = build_engine(
            plan, self.config, self.streams, device, weights, settings, fill=not load
        )
        described = {"store": "", "manifest_sha256": "s", "vocabulary": "v", "detector": {}}
        vocabulary = f"{folder}/vocab.txt"
        self.checkpoints = Checkpoints(self.config, sizes, self.state, described, vocabulary)
        self.progress = Progress()
        if load:
            self.progress = self.checkpoints.load(self.engine, Path(load))

    def train(self, last: int) -> list[tuple[float, float]]:
        """Train up to step `last`; return each step's loss and gradient norm."""
        from megatron_interbert.data.packing import pack
        from megatron_interbert.training.fragments import FragmentedState
        from megatron_interbert.virtual.samples import random_examples

        results = []
        for step in range(self.progress.step + 1, last + 1):
            self.streams.start_step(step)
            seed = 10 * step + self.state.data_rank
            examples = random_examples(self.sizes, 2, (8, 20), (10, 36), seed=seed)
            batch = pack(examples, self.sizes.feature_dim)
            totals = self.state.sum_over_data(batch.target_counts())
            loss = self.task.loss(self.engine.forward(batch), batch, totals)[0]
            self.engine.backward(loss, last=True)
            norm, _ = self.engine.step(1e-3)
            self.engine.ema.update(step, FragmentedState(self.engine).tensors())
            results.append((float(self.state.sum_over_data(loss.detach())), norm))
            self.progress.step = step

        return results

    def save(self) -> None:
        self.checkpoints.save(self.engine, self.progress)
        self.checkpoints.wait()
        assert self.checkpoints.newest, self.checkpoints.messages()


def swapped(device: str) -> dict:
    """Return a DeepSpeed JSON that offloads to `device`: none, cpu, optimizer or all (to nvme)."""
    zero = {"stage": 3, "sub_group_size": 1_000_000}
    if device != "none":
        where = "cpu" if device == "cpu" else "nvme"
        zero["offload_optimizer"] = {"device": where, "nvme_path": "auto"}
    if device == "all":
        zero["offload_param"] = {"device": "nvme", "nvme_path": "auto", "buffer_size": 2_000_000}

    return {"zero_optimization": zero}


def train_everywhere(folder: str) -> None:
    """Train, save and resume with each kind of offload: a resumed run continues bit for bit, and
    disks change nothing.
    """
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    undisturbed = {}

    for device in ("none", "cpu", "optimizer", "all"):
        run = Run(folder, device, device)
        before = run.train(SAVED)
        run.save()
        undisturbed[device] = before + run.train(LAST)
        if device in ("optimizer", "all"):
            check_files(run, folder)

    assert undisturbed["optimizer"] == undisturbed["all"] == undisturbed["cpu"]
    check_close(undisturbed["cpu"], undisturbed["none"])
    for source, target in (("all", "all"), ("all", "none"), ("none", "optimizer")):
        path = f"{folder}/{source}/global_step{SAVED}"
        results = Run(folder, f"{source}-{target}", target, load=path).train(LAST)
        check_close(results, undisturbed[target][SAVED:])
        if source == target:
            assert results == undisturbed[target][SAVED:]


def check_close(
    results: list[tuple[float, float]], expected: list[tuple[float, float]], of_norm: float = 1e-3
) -> None:
    """Compare losses and norms: DeepSpeed sums the norm in float32 under offload, float64 without,
    and clipping by it rounds weights to other bfloat16 numbers.
    """
    for (loss, norm), (other_loss, other_norm) in zip(results, expected, strict=True):
        assert abs(loss / other_loss - 1) < 1e-4, (results, expected)
        assert abs(norm / other_norm - 1) < of_norm, (results, expected)


def check_files(run: Run, folder: str) -> None:
    """Check that state is on the disk, and that a file that is cut short ends the run."""
    files = dict(swap.swap_files(run.engine.deepspeed.optimizer))
    assert files
    assert all(path.is_relative_to(f"{folder}/nvme") for path in files)
    share = rank_parameters(MEASURABLE, 1) / run.state.data_size
    assert sum(path.stat().st_size for path in files) > 11 * share
    swap.check_swap_files(run.engine.deepspeed.optimizer)

    path = next(iter(files))
    content = path.read_bytes()
    path.write_bytes(content[:-4096])
    with pytest.raises(TrainingStopped, match="the disk is full"):
        swap.check_swap_files(run.engine.deepspeed.optimizer)
    path.write_bytes(content)


@needs_built_library
def test_offload_to_nvme(tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    (tmp_path / "vocab.txt").write_text("x\n")
    for device in ("none", "cpu", "optimizer", "all"):
        (tmp_path / f"{device}.json").write_text(json.dumps(swapped(device)))

    run_on_ranks(2, train_everywhere, str(tmp_path))
    swap.remove_leftovers(tmp_path / "nvme")  # these ranks end as killed ones do
    assert not any((tmp_path / "nvme").iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 300 MB, with a file system of its own."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(300_000_000)
    place = tmp_path / "disk"
    place.mkdir()
    for command in (("mkfs.ext4", "-q", image), ("mount", "-o", "loop", image, place)):
        found = shutil.which(command[0])
        if not found or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"{command[0]} is not possible here: it wants root and a loop device")

    yield place
    subprocess.run(["umount", "-l", place], check=True)


@needs_built_library
def test_a_disk_that_others_fill(store: Path, disk: Path, tmp_path: Path) -> None:
    """Fill the disk once the run has found room on it: one line, and nothing stays there."""
    sizes = {**dataclasses.asdict(MEASURABLE), "vocab_size": 0, "feature_dim": 0, "num_classes": 0}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    flags = ("--data-path", store, "--model", tmp_path / "sizes.json", "--bf16")
    flags = (*flags, "--deepspeed-config", "zero3_nvme_optimizer", "--nvme-path", disk)
    run = start(*pretrain(*flags, "--micro-batch-size", 2, "--train-iters", 10))
    until(lambda: list(disk.glob("interbert-swap-*")), "the run's swap folder")
    with (disk / "other").open("wb") as other:  # at once, before the run writes
        os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(disk).free - 10_000_000)

    [(code, out, err)] = ends([run])
    assert code == 1, out + err
    assert re.search(rf"error: {disk}: a swap file has \d+ of \d+ bytes, .*: the disk is full", err)
    assert "Traceback" not in err
    assert {path.name for path in disk.iterdir()} == {"lost+found", "other"}


@needs_library
def test_a_build_that_fails_or_is_stopped_ends_the_run(store: Path, tmp_path: Path) -> None:
    """Check the run's last line and code where the compiler fails, and where a signal reaches all
    processes while it works; loader processes must not outlive it.
    """
    compiler = tmp_path / "c++"
    called = tmp_path / "called"
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(swapped("optimizer")))
    flags = ("--data-path", store, "--bf16", "--deepspeed-config", file)
    flags = (*flags, "--nvme-path", tmp_path, "--num-workers", 2)
    places = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}

    fails = "echo 'x.cpp:1: error: no such thing' >&2; exit 1"
    waits = f"touch {called}; sleep 100"
    for work, code, last in (
        (fails, 2, r"error: DeepSpeed's I/O library in .*: x.cpp:1: error: no such thing; .*"),
        (waits, 75, r"SIGTERM: ended; .*"),
    ):
        compiler.write_text(f"""#!/bin/sh
            case "$*" in *.cpp*) {work};; *) exec c++ "$@";; esac
        """)
        compiler.chmod(0o755)
        process = start(*pretrain(*flags), warm=False, **places)

        if work == waits:
            until(called.exists, "the compiler is called")
            os.killpg(process.pid, signal.SIGTERM)

        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        assert "building DeepSpeed's I/O library" in out
        assert "Traceback" not in err
        assert re.fullmatch(last, err.strip().splitlines()[-1])


@needs_library
def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "load_library", lambda: None)
    settings = {
        "zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    }
    with pytest.raises(UsageError, match=r"B free, the optimizer's state .* need 168.00 TB"):
        swap.prepare_swap(settings, 10**13, 1)
    assert not any(tmp_path.iterdir())

    prepared = swap.prepare_swap(settings, 1000, 1)
    own = Path(prepared["zero_optimization"]["offload_optimizer"]["nvme_path"])
    assert own.parent == tmp_path
    swap.remove_leftovers(tmp_path)
    assert own.is_dir(), "this process holds its lock"

    (tmp_path / f"{swap.PREFIX}killed").mkdir()
    swap.remove_leftovers(tmp_path)
    assert [own] == list(tmp_path.iterdir())


def test_what_offload_needs_is_said(tmp_path: Path) -> None:
    """Check the messages for a stage that cannot offload, for a missing folder, and for one that
    nobody can write to.
    """
    from megatron_interbert.training.deepspeed_config import merge

    file = tmp_path / "ds.json"
    file.write_text(json.dumps(swapped("optimizer")))
    config = RunConfig(deepspeed_config=str(file), bf16=True, micro_batch_size=1)
    with pytest.raises(UsageError, match=r"to nvme needs a folder .* give --nvme-path"):
        merge(config, 1)

    config.nvme_path = str(tmp_path / "none")
    with pytest.raises(UsageError, match=r"none: no such folder; give --nvme-path a folder"):
        swap.prepare_swap(merge(config, 1), 1, 1)

    config.nvme_path = "/proc"
    with pytest.raises(UsageError, match="nvme_path /proc: nothing can be written there"):
        swap.prepare_swap(merge(config, 1), 1, 1)

    idle = RunConfig(nvme_path=str(tmp_path), micro_batch_size=1)
    with pytest.raises(UsageError, match=r"--nvme-path .*: nothing is offloaded to a disk"):
        merge(idle, 1)

    zero = {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UsageError, match="offload_optimizer to nvme needs ZeRO stage 3"):
        merge(RunConfig(deepspeed_config=str(file), bf16=True, micro_batch_size=1), 1)
