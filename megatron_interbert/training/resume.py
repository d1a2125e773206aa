"""Which checkpoint a run goes on from, and whether it is of this run."""

import contextlib
import copy
import dataclasses
import fcntl
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO, Any

from megatron_interbert.config import ModelConfig, TrainConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.optimizer import learning_rate
from megatron_interbert.weights.manifest import MANIFEST, STEP_FOLDER, complete_checkpoints, read_manifest, verify

# Settings that may change on resume; a change is said.
SCHEDULE = (
    *("train_iters", "global_batch_size", "lr", "min_lr", "lr_warmup_fraction", "lr_decay_style", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "lr_milestones"),
    *("lr_decay_factor", "ema_decay"),
)
LOCK = ".lock"


def claim_folder(folder: str, state: ParallelState) -> IO | None:
    """Lock --save for this run as long as the returned file is open (on rank 0); UsageError when another run holds it."""
    handle, problem = None, None
    if folder and state.is_main:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            handle = open(Path(folder) / LOCK, "a+")
        except OSError as error:
            problem = f"--save {folder}: nothing can be written there ({error.strerror}); choose another folder"
    if handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock of the process: workers forked later do not inherit it
            handle.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=handle, flush=True)
        except BlockingIOError:
            handle.seek(0)
            problem = (
                f"--save {folder}: another run writes there ({handle.read().strip()}); end that process (SIGTERM: it saves"
                " first), or choose another --save"
            )
        except OSError as error:
            print(f"note: --save {folder} cannot be locked ({error.strerror}); see that no other run writes there", flush=True)
    problem = state.gather(problem)[0]
    if problem:
        raise UsageError(problem)
    return handle


def keep_fitted(config: TrainConfig, state: ParallelState) -> None:
    """Take settings that are fitted to the data from the newest checkpoint, where no flag gives them.

    Nothing is verified yet; a manifest that cannot be read is passed over, the one before it is of
    the same run.
    """
    if config.resume == "never":
        return
    found = newest_settings(config) if state.is_main else None
    path, before = state.gather(found)[0] or ("", {})
    for name in config.FITTED:
        if name in before and config.is_default(name):
            config.settle(name, before[name], path)


def newest_settings(config: TrainConfig) -> tuple[str, dict[str, Any]] | None:
    """Give (folder, the run's settings) of the newest checkpoint of --save or --load that can be read."""
    found = newest_manifest(config)
    return found and (str(found[0]), found[1]["configs"]["run"])


def newest_manifest(config: TrainConfig) -> tuple[Path, dict[str, Any]] | None:
    """Give (folder, manifest) of the newest checkpoint of --save or --load that can be read."""
    for folder in (config.save, config.load):
        for path in complete_checkpoints(Path(folder)) if folder else []:
            with contextlib.suppress(UsageError, KeyError, TypeError):
                manifest = read_manifest(path)
                if isinstance(manifest["configs"]["run"], dict):
                    return path, manifest
    return None


def find_checkpoint(config: TrainConfig, state: ParallelState) -> Path | None:
    """The newest good checkpoint to resume from, of --save, else of --load; None to start anew.

    Every rank hashes its share of the files. A damaged checkpoint of --save is set aside under another name, so that nothing
    counts it again.
    """
    own = Path(config.save) if config.save else None
    if own and state.is_main:
        for leftover in own.glob(f".{STEP_FOLDER}*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while it wrote
    if config.resume == "never":
        if own and _candidates(own, state):
            raise UsageError(f"--resume never: {own} holds checkpoints; choose another --save, or give --resume auto to go on")
        return None
    for folder in (own, Path(config.load) if config.load else None):
        for candidate in _candidates(folder, state) if folder else []:
            problem = next((p for p in state.gather(verify(candidate, state.rank, state.world_size)) if p), None)
            if problem is None:
                return candidate
            if state.is_main:
                print(f"checkpoint {candidate} is damaged ({problem}); trying the one before it", flush=True)
                if folder == own:
                    set_aside(candidate)
            state.barrier()
    if config.resume == "must":
        raise UsageError(f"--resume must: no complete checkpoint in {own or config.load or '--save, which is not given'}")
    if config.load:
        raise UsageError(f"--load {config.load}: no complete checkpoint there")
    return None


def _candidates(folder: Path, state: ParallelState) -> list[Path]:
    """What rank 0 sees (on a network disk the others might see less), newest first."""
    found = None
    if state.is_main:
        found = complete_checkpoints(folder)
        for path in sorted(folder.glob(f"{STEP_FOLDER}*")):
            if path.is_dir() and not (path / MANIFEST).exists():
                print(f"note: {path} has no {MANIFEST}: not a checkpoint of ours, or damaged; it is not counted", flush=True)
    return state.gather(found)[0]


def set_aside(path: Path) -> None:
    """Give a folder a name under which nothing takes it for a checkpoint."""
    os.rename(path, path.with_name(f"damaged-{path.name}-{time.time_ns()}"))


def partial_folder(final: Path) -> Path:
    """Where a checkpoint grows before it is renamed, and where it goes to be removed."""
    return final.with_name(f".{final.name}.partial")


def resumed_batch(path: Path | None) -> int:
    """The global batch of a checkpoint to resume from, which holds on any number of ranks; 0 without one."""
    return read_manifest(path)["configs"]["run"]["global_batch_size"] if path else 0


def resumed_micro_batch(path: Path | None, share: int) -> int:
    """That of a checkpoint to resume from, where it divides a rank's `share` of the global batch, else 0: with it a run goes on bit for
    bit."""
    before = read_manifest(path)["configs"]["run"]["micro_batch_size"] if path else 0
    return before if before and share % before == 0 else 0


def changed_settings(manifest: dict[str, Any], config: TrainConfig) -> list[str]:
    """`name old -> new` of the settings that may change and did."""
    before = manifest["configs"]["run"]
    return [f"{n} {before[n]} -> {getattr(config, n)}" for n in SCHEDULE if n in before and before[n] != getattr(config, n)]


def changed_rate(manifest: dict[str, Any], config: TrainConfig) -> str:
    """What the learning rate does where a resumed run has another length; empty where it has not."""
    before = {**manifest["configs"]["run"]}
    step, length = manifest["iteration"], before["train_iters"]
    if length == config.train_iters or step >= config.train_iters:
        return ""
    old = copy.copy(config)
    for name in SCHEDULE:
        setattr(old, name, before.get(name, getattr(old, name)))
    return (
        f"note: {length} steps become {config.train_iters}: the learning rate was"
        f" {learning_rate(step, old):.2e} at step {step} and is"
        f" {learning_rate(step + 1, config):.2e} at step {step + 1}, on the schedule of the new length"
    )


def defaults(config: Any) -> dict[str, Any]:
    """Values of a configuration that was told nothing."""
    return {field.name: field.default for field in dataclasses.fields(config)}


def check_same_run(
    manifest: dict[str, Any], config: TrainConfig, model_config: ModelConfig, data: dict[str, Any], where: str
) -> None:
    """Raise UsageError unless a checkpoint is of this model, these data and these samples.

    What an older version did not know had its default.
    """
    check_same_model(manifest, model_config, data, where)
    for name in config.SAME_SAMPLES:
        before, now = {**defaults(config), **manifest["configs"]["run"]}[name], getattr(config, name)
        if before != now:
            raise UsageError(f"{where}: made with {name} = {before}, this run has {now}, so samples or losses would differ;"
                             " use the same value, or another --save")  # fmt: skip


def check_same_model(
    manifest: dict[str, Any], model_config: ModelConfig, data: dict[str, Any], where: str
) -> None:
    """Raise UsageError unless a checkpoint is of this model, task and data."""
    theirs, ours = {**defaults(model_config), **manifest["configs"]["model"]}, dataclasses.asdict(model_config)
    differing = [k for k in ours if theirs.get(k) != ours[k] and not k.endswith("dropout")]
    if differing:
        sizes = ", ".join(f"{k} {theirs.get(k)} against {ours[k]}" for k in differing)
        raise UsageError(f"{where}: made with other model sizes ({sizes}); use the same --model, vocabulary and data")
    if manifest["data"].get("task") != data.get("task"):
        raise UsageError(f"{where}: a run of {manifest['data'].get('task') or 'pretraining'}; choose another --save, and start from its"
                         " weights by --init-from")  # fmt: skip
    if manifest["data"]["vocabulary"] != data["vocabulary"]:
        raise UsageError(f"{where}: made with another vocabulary; give that vocabulary by --vocab-file")
    if manifest["data"]["manifest_sha256"] != data["manifest_sha256"]:
        raise UsageError(f"{where}: the region store has changed since ({data['store']}), so samples would differ;"
                         " give the store it was made on, or take only its weights by --init-from")  # fmt: skip
