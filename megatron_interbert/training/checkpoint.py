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
from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import unshard_state
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.engine import Engine

MANIFEST = "manifest.json"
FORMAT = 1
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
        """Write `global_stepN` atomically and prune old ones; the path. All ranks take part."""
        folder = Path(self.config.save)
        final = folder / f"global_step{progress.step}"
        work = folder / f".{final.name}.partial"
        if self.state.is_main:
            shutil.rmtree(work, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        self.state.barrier()
        engine.deepspeed.save_checkpoint(str(folder), tag=work.name, client_state=dataclasses.asdict(progress), save_latest=False)
        save_weights(engine, work, self.state)
        self.state.barrier()
        hashes = self._hash_files(work)
        if self.state.is_main:
            write_json(work / MANIFEST, self._manifest(engine, progress, hashes))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
            flush_folder(folder)
            write_text(folder / POINTER, final.name)
            write_text(folder / MEGATRON_POINTER, str(progress.step))
            self._prune(folder)
        self.state.barrier()
        return final

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

    def _prune(self, folder: Path) -> None:
        if self.config.keep_last:
            for old in complete_checkpoints(folder)[self.config.keep_last :]:
                shutil.rmtree(old)

    def wait(self) -> None:
        """Finish what is being written. Saving is synchronous, so there is nothing to wait for yet."""

    def find(self) -> Path | None:
        """The newest good checkpoint to resume from, by --resume; None to start anew. Rank 0 looks and verifies."""
        config = self.config
        folder = Path(config.load or config.save)
        if config.resume == "never" or not (config.load or config.save):
            if config.resume == "must":
                raise UsageError("--resume must: give --save or --load, the folder of the checkpoints")
            return None
        found: list[str | None] = [None]
        if self.state.is_main:
            for candidate in complete_checkpoints(folder):
                problem = verify(candidate)
                if problem is None:
                    found = [str(candidate)]
                    break
                print(f"checkpoint {candidate} is damaged ({problem}); trying the one before it", flush=True)
        if self.state.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            if config.resume == "must":
                raise UsageError(f"--resume must: no complete checkpoint in {folder}; use --resume auto to start anew")
            if config.load:
                raise UsageError(f"--load {config.load}: no complete checkpoint there")
            return None
        return Path(found[0])

    def load(self, engine: Engine, path: Path) -> Progress:
        """Weights, optimizer and progress from a verified checkpoint; UsageError when it is of another run."""
        manifest = read_manifest(path)
        self._check_same_run(manifest, path)
        engine.deepspeed.load_checkpoint(str(path.parent), tag=path.name)
        return Progress(manifest["iteration"], manifest["consumed_samples"])

    def _check_same_run(self, manifest: dict[str, Any], path: Path) -> None:
        if manifest["configs"]["model"] != dataclasses.asdict(self.model_config):
            theirs = manifest["configs"]["model"]
            differing = [k for k, v in dataclasses.asdict(self.model_config).items() if theirs.get(k) != v]
            raise UsageError(
                f"{path}: made with other model sizes ({', '.join(f'{k} {theirs.get(k)}' for k in differing)});"
                " use the same --model, vocabulary and data, or another --save"
            )
        if manifest["data"].get("vocabulary") != self.data.get("vocabulary"):
            raise UsageError(f"{path}: made with another vocabulary; give that vocabulary by --vocab-file, or another --save")
        for name in ("seed", "data_partitions", "masking", "language"):
            theirs, ours = manifest["configs"]["run"].get(name), getattr(self.config, name)
            if theirs != ours:
                raise UsageError(
                    f"{path}: made with {name} = {theirs}, this run has {ours}, so samples would come in another"
                    " order; use the same value, or another --save"
                )
        mine, theirs = topology(self.config, self.state), manifest["topology"]
        if theirs != mine:
            raise UsageError(
                f"{path}: saved on {describe(theirs)}, this run is {describe(mine)}; start it on the same layout, or"
                " take only its weights by --init-from"
            )


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


def verify(path: Path) -> str | None:
    """None when every file is as the manifest says, else what is wrong."""
    try:
        files = read_manifest(path)["files"]
    except (UsageError, KeyError) as error:
        return str(error)
    for name, entry in files.items():
        file = path / name
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
