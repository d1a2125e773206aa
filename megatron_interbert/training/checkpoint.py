"""Save and load checkpoints: every rank writes its share, a manifest completes them, a rename
publishes them.

A save copies the state to host memory and returns; a thread on every rank writes, flushes and
hashes the rank's files in a temporary folder. Once all ranks have succeeded, rank 0 writes the
manifest, renames the folder to `global_stepN` and moves the pointers. A folder without a valid
manifest does not count as a checkpoint. All files are safetensors and JSON, apart from the
vocabulary: nothing in a checkpoint can run code. Fragments of fp32 weights and moments are
resharded when read, so any layout resumes from any other (DeepSpeed's own format needs a conversion
for that, and its universal form loses the parameter groups' settings at ZeRO-3 and does not split
tensor-parallel slices there).
"""

import contextlib
import dataclasses
import math
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import file_entry, readable_size, write_bytes
from megatron_interbert.machines.host import free_memory
from megatron_interbert.model.partition import full_shape, place_of
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import COLLECTIVE_TIMEOUT, ParallelState
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import Fragment, FragmentedState, Outline
from megatron_interbert.training.resume import changed_rate, changed_settings, check_same_run
from megatron_interbert.training.run_folder import Claim, RunFolder
from megatron_interbert.weights.manifest import (
    STEP_FOLDER,
    VOCABULARY,
    versions,
    weights_name,
    write_manifest,
)
from megatron_interbert.weights.reader import KINDS, CheckpointReader, describe_pieces, piece_key
from megatron_interbert.weights.tensor_files import TensorLayout, TensorWriter, is_finite

FP32 = 4  # bytes
MOST_OF_FREE = 0.8  # share of the free memory that a copy of the training state may take

# one failed save is reported and training continues; a second one in a row ends the run
FAILURES_ALLOWED = 1


@dataclass
class Progress:
    """Hold how far a run is. Random streams need no state: they follow from (seed, step)."""

    step: int = 0
    consumed_samples: int = 0
    best_step: int = 0  # of the evaluation with the best figure so far
    best_value: float | None = None
    stale: int = 0  # evaluations since then
    owes_evaluation: bool = False  # the evaluation of this step has not been done yet
    # step and metrics of each evaluation, for jobs that are told of them
    evaluations: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)

    def note(self, value: float) -> bool:
        """Note an evaluation's metric at this step; return whether it is the best so far."""
        if math.isfinite(value) and (self.best_value is None or value > self.best_value):
            self.best_step = self.step
            self.best_value = value
            self.stale = 0
            return True

        self.stale += 1

        return False


@dataclass(frozen=True)
class Judge:
    """Hold what decides which checkpoint is best: a metric, and the digest of the data it is
    measured on.
    """

    metric: str = ""
    data: str = ""


@dataclass
class Problem:
    """Hold why a checkpoint was not written; `hopeless`: no later one can succeed either."""

    text: str
    hopeless: bool = False


class NotFinite(ValueError):
    """Signal that the state to be saved contains NaN or infinity."""


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NotFinite, naming the tensor, if it contains NaN or infinity."""
    if not is_finite(tensor):
        raise NotFinite(
            f"{name} has elements that are not finite and is not saved: the run has diverged;"
            " lower --lr and resume from the newest checkpoint"
        )


@dataclass
class Snapshot:
    """Hold what this rank writes: the outline of its fragments, the kinds of tensors of each, the
    fragments themselves in the same order, and the manifest.

    The fragments are copies in host memory, or come from the training state as they are asked for.
    """

    step: int
    outline: list[Outline]
    kinds: tuple[str, ...]
    fragments: Iterable[Fragment]
    manifest: dict[str, Any]
    prune: bool = True  # remove older checkpoints afterwards
    alive: Callable[[], None] = lambda: None  # called after each piece, if training waits


class Checkpoints:
    """Save and load the checkpoints of one run.

    All ranks must call the same methods in the same order.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        state: ParallelState,
        data: dict[str, Any],
        vocabulary: str,
        claim: Claim | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.state = state
        self.data = data
        self.judge = judge or Judge()
        # goes into every checkpoint; the file may be gone by the time of a save
        self.vocabulary = Path(vocabulary).read_bytes()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()  # from the thread, for the log
        token = state.gather(f"{os.getpid()}-{time.time_ns()}")[0]
        self.folder = RunFolder(Path(config.save), claim or Claim(), token, self._messages.put)
        self.revision = git_revision()
        self._host: dict[tuple[str, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem: Problem | None = None
        self._failures = 0
        self.newest: Path | None = None  # the checkpoint to resume from
        # The writing threads must not use the groups on which training communicates.
        self._group = None
        if state.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def save(
        self,
        engine: Engine,
        progress: Progress,
        prune: bool = True,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for the previous save, copy the state and start writing it; then prune older
        checkpoints if `prune`. Raises TrainingStopped if saves keep failing.

        A state that has no room in memory a second time, or that is on an NVMe disk, is written
        piece by piece while training waits, and `alive` is called after each of them.
        """
        self.wait(allowed=FAILURES_ALLOWED)
        started = time.monotonic()
        training_state = FragmentedState(engine)
        copied = self._may_copy(training_state)
        snapshot = self._snapshot(training_state, progress, copied)
        snapshot.prune = prune
        if not copied:
            snapshot.alive = alive
            self._write(snapshot, started, None)
            self._conclude(FAILURES_ALLOWED)
            return

        self._thread = threading.Thread(
            target=self._write, args=(snapshot, started, time.monotonic()), daemon=True
        )
        self._thread.start()
        if not self.config.async_save:
            self.wait(allowed=FAILURES_ALLOWED)

    def wait(self, allowed: int = 0) -> None:
        """Wait until the save in progress is on disk.

        Raises TrainingStopped on all ranks after more than `allowed` failed saves in a row.
        """
        if self._thread is None:
            return

        self._thread.join()
        self._thread = None
        self._conclude(allowed)

    def _conclude(self, allowed: int) -> None:
        """Count whether the save that has just ended failed; TrainingStopped as `wait` says."""
        self._failures = self._failures + 1 if self._problem else 0
        if self.hopeless:
            raise TrainingStopped(self.hopeless)
        if self._failures > allowed:
            raise TrainingStopped(
                f"{self.config.save}: the checkpoint cannot be written ({self._problem.text});"
                " make room there, or raise the limit (ulimit -f), and run the same command again"
            )

    @property
    def hopeless(self) -> str:
        """Return why no later save can succeed, else ""; ranks learn of it at different times."""
        problem = self._problem
        return f"{self.config.save}: {problem.text}" if problem and problem.hopeless else ""

    @property
    def came_from_elsewhere(self) -> bool:
        """Check whether the newest checkpoint is outside --save, that is, from --load."""
        return self.newest is not None and self.newest.parent != self.folder.path

    def writing(self) -> bool:
        """Check whether a save is in progress in the background."""
        return self._thread is not None and self._thread.is_alive()

    def messages(self) -> list[str]:
        """Return log lines about what was read and about saves that have ended, since the last
        call.
        """
        lines = []
        while not self._messages.empty():
            lines.append(self._messages.get())
        return lines

    def _may_copy(self, training_state: FragmentedState) -> bool:
        """Check whether all ranks have room in host memory for a copy of what they write."""
        if training_state.on_disk:
            return False
        if self._host:  # buffers of an earlier save
            return True

        wanted = FP32 * len(training_state.kinds) * sum(p.length for p in training_state.outline())
        room = free_memory() / read_launch().local_size
        fits = all(self.state.gather(wanted < MOST_OF_FREE * room))
        if not fits and self.state.is_main:
            self._messages.put(
                f"note: a copy of the training state ({wanted / 2**30:.1f} GiB a rank) has no room"
                " in memory, so training waits while checkpoints are written"
            )

        return fits

    def _snapshot(
        self, training_state: FragmentedState, progress: Progress, copied: bool
    ) -> Snapshot:
        """Describe what to write, with copies of all tensors in host memory if `copied`."""
        fragments: Iterable[Fragment] = training_state.owned()
        if copied:
            fragments = [self._copy(fragment) for fragment in fragments]
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()

        return Snapshot(
            progress.step,
            training_state.outline(),
            training_state.kinds,
            fragments,
            self._manifest(training_state, progress),
        )

    def _copy(self, fragment: Fragment) -> Fragment:
        """Copy a fragment into host buffers, which are reused, so that later saves cause no page
        faults; the device may still be copying.
        """
        tensors = {}

        for kind, tensor in fragment.tensors.items():
            key = (fragment.name, kind)
            buffer = self._host.get(key)
            if buffer is None or buffer.numel() != tensor.numel():
                buffer = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=tensor.is_cuda)
                self._host[key] = buffer

            tensors[kind] = buffer.copy_(tensor, non_blocking=True)

        return Fragment(fragment.name, fragment.start, fragment.shape, tensors)

    def _manifest(self, training_state: FragmentedState, progress: Progress) -> dict[str, Any]:
        engine = training_state.engine
        shapes = {
            n: full_shape(n, getattr(p, "ds_shape", p.shape), place_of(n, self.state)[1])
            for n, p in engine.model.named_parameters()
        }
        return {
            "iteration": progress.step,
            "consumed_samples": progress.consumed_samples,
            "owes_evaluation": progress.owes_evaluation,
            "evaluations": list(progress.evaluations),
            "best": {
                "step": progress.best_step,
                "value": progress.best_value,
                "stale": progress.stale,
                "metric": self.judge.metric,
                "data": self.judge.data,
            },
            "topology": topology(engine.config, self.state),
            "precision": engine.precision,
            "training_state": training_state.scalars(),
            "rng": {
                "seed": self.config.seed,
                "streams": "function of (seed, step, rank), no state",
            },
            "versions": {**versions(), "deepspeed": deepspeed.__version__},
            "git_revision": self.revision,
            "configs": {
                "run": dataclasses.asdict(self.config),
                "model": dataclasses.asdict(self.model_config),
                "deepspeed": engine.deepspeed_config,
            },
            "data": self.data,
            "parameters": shapes,
        }

    # The methods from here to `load` run in the writing thread.

    def _write(self, snapshot: Snapshot, started: float, copied: float | None) -> None:
        final = self.folder.path / f"{STEP_FOLDER}{snapshot.step}"
        work = self.folder.partial(final)
        outcome: dict[str, Any] | Problem

        try:
            outcome = self._write_files(snapshot, work)
        except NotFinite as error:
            outcome = Problem(f"rank {self.state.rank}: {error}", hopeless=True)
        except Exception as error:  # of any kind: the other ranks must learn of it, not wait
            outcome = Problem(f"rank {self.state.rank}: {error}")

        try:
            files: dict[str, Any] = {}
            problem = None

            for result in self._gather(outcome):
                if isinstance(result, Problem):
                    problem = problem or result
                else:
                    files.update(result)

            if self.state.is_main:
                problem = problem or self._publish(work, final, snapshot, files)
                if problem:
                    shutil.rmtree(work, ignore_errors=True)

            self._problem = self._gather(problem)[0]
        # mostly because a rank has died; this rank's training step will then fail soon too
        except Exception as error:
            self._problem = Problem(
                f"the ranks could not agree on it ({' '.join(str(error).split())[:120]})"
            )

        if self._problem:
            kept = f"; {self.newest} is untouched" if self.newest else ""
            self._messages.put(
                f"checkpoint {final} could not be written: {self._problem.text}{kept}"
            )
        else:
            self.newest = final
            total = time.monotonic() - started
            stall = total if copied is None else copied - started
            written = sum(entry["bytes"] for entry in files.values())
            self._messages.put(
                f"saved {final} (training waited {stall:.2f} s, on disk after {total:.2f} s:"
                f" {readable_size(written)}, {written / total / 1e6:.0f} MB/s)"
            )

    def _write_files(self, snapshot: Snapshot, work: Path) -> dict[str, Any]:
        """Write and flush this rank's files; return {name: {bytes, sha256}}."""
        self.folder.renew()
        work.mkdir(parents=True, exist_ok=True)
        state = self.state
        entries = {}

        with contextlib.ExitStack() as stack:
            writers = {}
            for file in dict.fromkeys(KINDS[kind] for kind in snapshot.kinds):
                name = weights_name(
                    (state.tensor_rank, state.tensor_size), (state.data_rank, state.data_size), file
                )
                layout, pieces = describe_file(snapshot, file)
                writer = TensorWriter(work / name, layout, describe_pieces(pieces))
                writers[file] = (name, stack.enter_context(writer))

            for piece, fragment in zip(snapshot.outline, snapshot.fragments, strict=True):
                for kind, tensor in fragment.tensors.items():
                    key = piece_key(piece.name, kind)
                    check_finite(key, tensor)
                    writers[KINDS[kind]][1].write(key, tensor.view(piece.written_shape))
                snapshot.alive()

            for name, writer in writers.values():
                entries[name] = writer.finish()

        if state.is_main:
            write_bytes(work / VOCABULARY, self.vocabulary)
            entries[VOCABULARY] = file_entry(work / VOCABULARY)

        return entries

    def _gather(self, value: Any) -> list[Any]:
        return self.state.gather(value, self._group)

    def _publish(
        self, work: Path, final: Path, snapshot: Snapshot, files: dict[str, Any]
    ) -> Problem | None:
        """Write the manifest, publish, move the pointers, prune; return what went wrong before the
        checkpoint was published, or None.
        """
        try:
            write_manifest(work, {**snapshot.manifest, "files": files})
            self.folder.publish(work, final)
        except (OSError, UsageError) as error:
            return Problem(str(error))

        best = f"{STEP_FOLDER}{snapshot.manifest['best']['step']}"
        self.folder.move_pointers(final, best)
        if snapshot.prune:
            self.folder.prune(final, best, self.config.keep_last, self.config.keep_every)

        return None

    def load(self, engine: Engine, path: Path) -> Progress:
        """Load weights and optimizer state from a verified checkpoint; return the progress.

        Raises UsageError if it is from another run.
        """
        reader = CheckpointReader(path)
        manifest = reader.manifest
        check_same_run(manifest, self.config, self.model_config, self.data, str(path))

        if self.state.is_main:
            notes = changed_settings(manifest, self.config)
            if notes:
                print(
                    f"note: changed since {path.name}: {', '.join(notes)}; the losses will"
                    " differ from those of the old run",
                    flush=True,
                )

            if note := changed_rate(manifest, self.config):
                print(note, flush=True)

            experts = self.model_config.experts > 0
            before = f"{describe(manifest['topology'], experts)}, {manifest['precision']}"
            now = f"{describe(topology(self.config, self.state), experts)}, {engine.precision}"
            if before != now:
                print(f"resharding {path.name}: {before} -> {now}", flush=True)

        started = time.monotonic()
        read = FP32 * FragmentedState(engine).fill(reader, manifest["training_state"])
        seconds = time.monotonic() - started
        self._messages.put(
            f"read {path} (rank 0: {seconds:.2f} s, {readable_size(read)},"
            f" {read / seconds / 1e6:.0f} MB/s)"
        )
        self.newest = path
        self.folder.count_as_ours(path)
        best = self._comparable(manifest.get("best", {}))

        return Progress(
            manifest["iteration"],
            manifest["consumed_samples"],
            best.get("step", 0),
            best.get("value"),
            best.get("stale", 0),
            manifest.get("owes_evaluation", False),
            [(step, values) for step, values in manifest.get("evaluations", [])],
        )

    def _comparable(self, best: dict[str, Any]) -> dict[str, Any]:
        """Return the manifest's entry on the best checkpoint; {} if it was judged by another metric
        or on other data than now.
        """
        before = Judge(best.get("metric", self.judge.metric), best.get("data", self.judge.data))
        if before == self.judge or not best.get("step"):
            return best

        if self.state.is_main:
            print(
                f"note: the best checkpoint so far, step {best['step']}, was judged by another"
                " metric or on other validation data; it no longer counts as the best",
                flush=True,
            )

        return {}

    def point_to_best(self, progress: Progress) -> None:
        """Link the best checkpoint if it is in --save."""
        if self.state.is_main and self.config.save:
            self.folder.point_to_best(f"{STEP_FOLDER}{progress.best_step}")


def describe_file(
    snapshot: Snapshot, file: str
) -> tuple[dict[str, TensorLayout], dict[str, tuple[int, tuple[int, ...]]]]:
    """Return what a rank's file of `file` tensors (weights, optimizer, ema) will hold: the layout
    of each tensor, and (start, shape of the whole slice) of each.
    """
    layout = {}
    pieces = {}

    for piece in snapshot.outline:
        for kind in snapshot.kinds:
            if KINDS[kind] == file:
                key = piece_key(piece.name, kind)
                layout[key] = TensorLayout(torch.float32, piece.written_shape)
                pieces[key] = (piece.start, piece.shape)

    return layout, pieces


def topology(config: TrainConfig, state: ParallelState) -> dict[str, int]:
    """Return the sizes that decide how a checkpoint is split into files."""
    return {
        "data_parallel": state.data_size,
        "tensor_parallel": state.tensor_size,
        "expert_parallel": state.expert_size,
        "zero_stage": config.zero_stage,
    }


def describe(layout: dict[str, int], experts: bool) -> str:
    """Format a topology for people, e.g. `DP2 x TP1, ZeRO-1`; with experts `DP2 x TP1, EP2, ..`."""
    divided = f", EP{layout['expert_parallel']}" if experts else ""

    return (
        f"DP{layout['data_parallel']} x TP{layout['tensor_parallel']}{divided},"
        f" ZeRO-{layout['zero_stage']}"
    )


def git_revision() -> str:
    """Return the git revision of the code; empty outside a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
