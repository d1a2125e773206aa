"""Checkpoints: DeepSpeed's folders, made whole by a manifest, published by a rename.

A checkpoint is written as a temporary folder; every file is flushed and hashed; the manifest follows, then the rename to
`global_stepN`, then the pointers `latest` (DeepSpeed) and `latest_checkpointed_iteration.txt` (Megatron). A folder without
a valid manifest does not exist. DeepSpeed's files are pickles: load only checkpoints that you trust. The weights are also
written as safetensors, one file per tensor-parallel rank, which are safe to load anywhere.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_interbert import __version__
from megatron_interbert.config import ModelConfig, RunConfig, model_config_from_dict
from megatron_interbert.data.store import file_sha256
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.model.partition import unshard_state
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.engine import Engine

MANIFEST = "manifest.json"
FORMAT = 1
# Settings on which the samples and losses of a step depend: a resumed run must have the same.
SAME_SAMPLES = (
    *("seed", "data_partitions", "masking", "language", "msm_on_mismatched", "hard_negatives", "max_regions", "max_tokens"),
    *("objectives", "dropout"),
)
# Settings that may change on resume; a change is said.
SCHEDULE = (
    *("train_iters", "global_batch_size", "lr", "min_lr", "lr_warmup_fraction", "lr_decay_style", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
)
POINTER, MEGATRON_POINTER = "latest", "latest_checkpointed_iteration.txt"


@dataclass
class Progress:
    """How far a run is. Random streams need no state: they are a function of (seed, step)."""

    step: int = 0
    consumed_samples: int = 0


class Checkpoints:
    """Saves to and resumes from folders of one run."""

    def __init__(self, config: RunConfig, model_config: ModelConfig, state: ParallelState, data: dict[str, Any]) -> None:
        self.config, self.model_config, self.state, self.data = config, model_config, state, data

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write `global_stepN` atomically and prune old ones; the path. All ranks take part.

        TrainingStopped when this rank cannot write (a full disk); the checkpoint before stays whole.
        """
        folder = Path(self.config.save)
        final = folder / f"global_step{progress.step}"
        work = folder / f".{final.name}.partial"
        try:
            self._write(engine, progress, work)
            if self.state.is_main:
                self._publish(work, final, progress)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own
            shutil.rmtree(work, ignore_errors=True)
            stopped = TrainingStopped(f"{final}: the checkpoint cannot be written ({error}); make room in {folder} and start again")
            stopped.local = True
            raise stopped from error
        self.state.barrier()
        return final

    def _write(self, engine: Engine, progress: Progress, work: Path) -> None:
        if self.state.is_main:
            shutil.rmtree(work, ignore_errors=True)
            work.parent.mkdir(parents=True, exist_ok=True)
        self.state.barrier()
        engine.deepspeed.save_checkpoint(
            str(work.parent), tag=work.name, client_state=dataclasses.asdict(progress), save_latest=False
        )
        save_weights(engine, work, self.state)
        self.state.barrier()
        hashes = self._hash_files(work)
        if self.state.is_main:
            write_json(work / MANIFEST, self._manifest(engine, progress, hashes))

    def _publish(self, work: Path, final: Path, progress: Progress) -> None:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        flush_folder(final.parent)
        write_text(final.parent / POINTER, final.name)
        write_text(final.parent / MEGATRON_POINTER, str(progress.step))
        if self.config.keep_last:
            for old in complete_checkpoints(final.parent)[self.config.keep_last :]:
                shutil.rmtree(old)

    def _hash_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Each rank flushes and hashes its share of the files; rank 0 gets all."""
        names = sorted(p.name for p in folder.iterdir())
        mine = {}
        for name in names[self.state.rank :: self.state.world_size]:
            with open(folder / name, "rb+") as handle:
                os.fsync(handle.fileno())
            mine[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        if self.state.world_size == 1:
            return mine
        shares: list[dict] = [{}] * self.state.world_size
        dist.all_gather_object(shares, mine)
        return {name: entry for share in shares for name, entry in share.items()}

    def _manifest(self, engine: Engine, progress: Progress, hashes: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "iteration": progress.step,
            "consumed_samples": progress.consumed_samples,
            "topology": topology(engine.config, self.state),
            "precision": engine.precision,
            "rng": {"seed": self.config.seed, "streams": "function of (seed, step, rank), no state"},
            "versions": {
                "megatron_interbert": __version__,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "python": platform.python_version(),
            },
            "git_revision": git_revision(),
            "configs": {
                "run": dataclasses.asdict(self.config),
                "model": dataclasses.asdict(self.model_config),
                "deepspeed": engine.deepspeed_config,
            },
            "data": self.data,
            "files": hashes,
        }

    def find(self) -> Path | None:
        """The newest good checkpoint to resume from, of --save, else of --load; None to start anew.

        Every rank hashes its share of the files. A damaged checkpoint of --save is set aside under another name, so that
        nothing counts it again.
        """
        config = self.config
        own = Path(config.save) if config.save else None
        if config.resume == "never":
            if own and complete_checkpoints(own):
                raise UsageError(f"--resume never: {own} holds checkpoints; choose another --save, or give --resume auto to go on")
            return None
        for folder in (own, Path(config.load) if config.load else None):
            for candidate in complete_checkpoints(folder) if folder else []:
                problem = self._verify_together(candidate)
                if problem is None:
                    return candidate
                if self.state.is_main:
                    print(f"checkpoint {candidate} is damaged ({problem}); trying the one before it", flush=True)
                    if folder == own:
                        os.rename(candidate, candidate.with_name(f"damaged-{candidate.name}-{time.time_ns()}"))
                self.state.barrier()
        if config.resume == "must":
            raise UsageError(f"--resume must: no complete checkpoint in {own or config.load or '--save, which is not given'}")
        if config.load:
            raise UsageError(f"--load {config.load}: no complete checkpoint there")
        return None

    def _verify_together(self, path: Path) -> str | None:
        problem = verify(path, self.state.rank, self.state.world_size)
        if self.state.world_size == 1:
            return problem
        problems: list[str | None] = [None] * self.state.world_size
        dist.all_gather_object(problems, problem)
        return next((p for p in problems if p), None)

    def load(self, engine: Engine, path: Path) -> Progress:
        """Weights, optimizer and progress from a verified checkpoint; UsageError when it is of another run."""
        manifest = read_manifest(path)
        self._check_same_run(manifest, engine, path)
        changed = {n: (manifest["configs"]["run"].get(n), getattr(self.config, n)) for n in SCHEDULE}
        notes = [f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items() if theirs != ours]
        if notes and self.state.is_main:
            print(f"note: changed since {path.name}: {', '.join(notes)}; the losses will not be those of the old run", flush=True)
        if engine.deepspeed.load_checkpoint(str(path.parent), tag=path.name)[0] is None:
            raise UsageError(f"{path}: DeepSpeed finds nothing to load there")
        return Progress(manifest["iteration"], manifest["consumed_samples"])

    def _check_same_run(self, manifest: dict[str, Any], engine: Engine, path: Path) -> None:
        check_same_model(manifest, self.model_config, self.data["vocabulary"], str(path))
        if manifest["data"]["manifest_sha256"] != self.data["manifest_sha256"]:
            raise UsageError(f"{path}: the region store has changed since ({self.data['store']}), so samples would differ;"
                             " give the store it was made on, or take only its weights by --init-from")  # fmt: skip
        for name in SAME_SAMPLES:
            theirs, ours = manifest["configs"]["run"].get(name), getattr(self.config, name)
            if theirs != ours:
                raise UsageError(f"{path}: made with {name} = {theirs}, this run has {ours}, so samples or losses would differ;"
                                 " use the same value, or another --save")  # fmt: skip
        mine, theirs = topology(self.config, self.state), manifest["topology"]
        if (theirs, manifest["precision"]) != (mine, engine.precision):
            raise UsageError(f"{path}: saved on {describe(theirs)} in {manifest['precision']}, this run is {describe(mine)} in"
                             f" {engine.precision}; start it on the same layout, or take only its weights by --init-from")  # fmt: skip


def check_same_model(manifest: dict[str, Any], model_config: ModelConfig, vocabulary: str, where: str) -> None:
    """UsageError unless a checkpoint is of this model and vocabulary (sha256). Dropout may differ."""
    theirs, ours = manifest["configs"]["model"], dataclasses.asdict(model_config)
    differing = [k for k in ours if theirs.get(k) != ours[k] and not k.endswith("dropout")]
    if differing:
        sizes = ", ".join(f"{k} {theirs.get(k)} against {ours[k]}" for k in differing)
        raise UsageError(f"{where}: made with other model sizes ({sizes}); use the same --model, vocabulary and data")
    if manifest["data"]["vocabulary"] != vocabulary:
        raise UsageError(f"{where}: made with another vocabulary; give that vocabulary by --vocab-file")


def topology(config: RunConfig, state: ParallelState) -> dict[str, int]:
    """Sizes that decide how a checkpoint is cut into files."""
    return {"data_parallel": state.data_size, "tensor_parallel": state.tensor_size, "zero_stage": config.zero_stage}


def describe(layout: dict[str, int]) -> str:
    """`DP2 x TP1, ZeRO-1`."""
    return f"DP{layout['data_parallel']} x TP{layout['tensor_parallel']}, ZeRO-{layout['zero_stage']}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders with a manifest, newest first."""
    found = [p for p in folder.glob("global_step*") if (p / MANIFEST).is_file() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]), reverse=True)


def verify(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """None when the files are as the manifest says, else what is wrong. Of several ranks each checks its share."""
    try:
        files = read_manifest(path)["files"]
    except (UsageError, KeyError) as error:
        return str(error)
    for name in sorted(files)[rank::ranks]:
        file, entry = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
        if file_sha256(file) != entry["sha256"]:
            return f"{name} has another sha256"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder."""
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: no readable {MANIFEST} ({error})") from error


def save_weights(engine: Engine, folder: Path, state: ParallelState) -> None:
    """`weights-tp-I-of-N.safetensors` by the first data-parallel rank of each; ZeRO-3 gathers one parameter at a time."""
    tensors = {}
    for name, parameter in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.config.zero_stage == 3):
            if state.data_rank == 0:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if state.data_rank == 0:
        save_file(tensors, folder / weights_name(state.tensor_rank, state.tensor_size))


def weights_name(rank: int, ranks: int) -> str:
    """File name of one tensor-parallel rank's weights."""
    return f"weights-tp-{rank:02d}-of-{ranks:02d}.safetensors"


def load_weights(folder: str | Path) -> tuple[dict[str, torch.Tensor], ModelConfig, dict[str, Any]]:
    """Full state dict, model sizes and manifest of a checkpoint folder, or of the newest one in a run's folder."""
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        candidates = complete_checkpoints(path)
        if not candidates:
            raise UsageError(f"{folder}: no complete checkpoint there, expected global_stepN with {MANIFEST}")
        path = candidates[0]
    manifest = read_manifest(path)
    ranks = manifest["topology"]["tensor_parallel"]
    states = []
    for rank in range(ranks):
        file = path / weights_name(rank, ranks)
        if not file.is_file() or file_sha256(file) != manifest["files"][file.name]["sha256"]:
            raise UsageError(f"{file}: missing or differs from {MANIFEST}; use another checkpoint")
        try:
            states.append(load_file(file))
        except SafetensorError as error:
            raise UsageError(f"{file}: not readable ({error})") from error
    return unshard_state(states), model_config_from_dict(manifest["configs"]["model"], str(path)), manifest


def write_text(path: Path, text: str) -> None:
    """Write beside, flush, rename."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written beside and renamed."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def git_revision() -> str:
    """Revision of the code, empty outside a checkout."""
    result = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()
