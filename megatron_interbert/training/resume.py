"""Find the checkpoint that a run resumes from, and check that it is from the same run."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import NOTE, SAME, Resume, flag, rows
from megatron_interbert.config.settings import ModelSettings
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.parallel.agreement import some, together
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import list_folder
from megatron_interbert.training.optimizer import learning_rate
from megatron_interbert.training.run_folder import (
    DAMAGED,
    MEGATRON_POINTER,
    POINTER,
    remove_leftovers,
    set_aside,
)
from megatron_interbert.weights.manifest import (
    BEST,
    MANIFEST,
    complete_checkpoints,
    read_manifest,
    step_folders,
    verify,
)


def settings_by_resume(config: TrainConfig, resume: Resume) -> list[str]:
    """List the settings whose changes a resumed run handles as `resume` says."""
    return [name for name, facts in rows(config) if facts.resume is resume]


def keep_fitted(config: TrainConfig, state: ParallelState) -> None:
    """Take settings fitted to the data from the newest checkpoint, unless flags give them.

    Checkpoints are not verified yet. A damaged manifest is skipped: the one before it is from the
    same run.
    """
    if config.resume == "never":
        return

    found = together(state, lambda: newest_settings(config) if state.is_main else None)
    take_fitted(config, state.gather(found)[0])


def take_fitted(config: TrainConfig, found: tuple[str, dict[str, Any]] | None) -> None:
    """Take settings fitted to the data from what `newest_settings` found, unless flags give
    them.
    """
    path, before = found or ("", {})
    for name, facts in rows(config):
        if facts.fitted and name in before and config.is_default(name):
            config.settle(name, before[name], path)


def newest_settings(config: TrainConfig) -> tuple[str, dict[str, Any]] | None:
    """Return (folder, the run's settings) of the newest checkpoint in --save or --load with a valid
    manifest, or None.
    """
    found = newest_manifest(config)
    return found and (str(found[0]), found[1]["configs"]["run"])


def newest_manifest(config: TrainConfig) -> tuple[Path, dict[str, Any]] | None:
    """Return (folder, manifest) of the newest checkpoint in --save, else --load, whose manifest is
    valid; None if there is none. Raises Unreadable if one cannot be read.
    """
    for folder in (config.save, config.load):
        for path in complete_checkpoints(Path(folder)) if folder else []:
            try:
                manifest = read_manifest(path)
            except Unreadable:
                raise
            except UsageError:
                continue

            with contextlib.suppress(KeyError, TypeError):
                if isinstance(manifest["configs"]["run"], dict):
                    return path, manifest

    return None


def find_checkpoint(config: TrainConfig, state: ParallelState, locked: bool = True) -> Path | None:
    """Find the newest intact checkpoint of --save, else of --load; None to start anew.

    Every rank hashes its share of the files. A damaged checkpoint in --save is renamed if the
    folder is `locked`, so that it no longer counts. Raises UsageError if --save has traces of
    checkpoints but none that can be used.
    """
    own = Path(config.save) if config.save else None
    if own and locked and state.is_main:
        remove_leftovers(own)

    if config.resume == "never":
        if config.load:
            raise UsageError(
                "--resume never and --load contradict each other; leave one of them out"
            )

        if own and _candidates(own, state):
            raise UsageError(
                f"--resume never: {own} holds checkpoints; choose another --save, or give --resume"
                " auto to resume from them"
            )

        return None

    if own:
        found = newest_sound(_candidates(own, state), state, rename=locked)
        if found:
            return found

    if config.load:
        found = newest_sound(_candidates(Path(config.load), state), state, rename=False)
        if found:
            return found

    if own:
        together(state, lambda: check_no_trace(own) if state.is_main else None)

    if config.resume == "must":
        raise UsageError(
            "--resume must: no complete checkpoint in"
            f" {own or config.load or '--save, which is not given'}"
        )

    if config.load:
        raise UsageError(f"--load {config.load}: no complete checkpoint there")

    return None


def newest_sound(candidates: list[Path], state: ParallelState, rename: bool) -> Path | None:
    """Return the first of `candidates` whose files are as they were written; all ranks check.

    Raises UsageError on all ranks if a file cannot be read, or if rank 0 does not see the damage
    that another rank sees: the checkpoint may be intact, so it is not renamed.
    """
    for candidate in candidates:
        found = functools.partial(verify, candidate, state.rank, state.world_size)
        told = state.gather((together(state, found), state.node))
        if not any(text for text, _ in told):
            return candidate

        damage = told[0][0] or together(
            state, lambda path=candidate: verify(path) if state.is_main else None
        )
        damage = state.gather(damage)[0]
        if damage is None:
            text, node = next((text, node) for text, node in told if text)
            raise UsageError(
                f"{candidate}: {text} as {node} sees it, but not as {told[0][1]} does (rank 0); it"
                " must be on a disk that all machines share"
            )

        if state.is_main:
            print(
                f"checkpoint {candidate} is damaged ({damage}); trying the one before it",
                flush=True,
            )

        together(
            state, lambda path=candidate: set_aside(path) if rename and state.is_main else None
        )

    return None


def check_no_trace(folder: Path) -> None:
    """Raise UsageError if a folder has traces of committed checkpoints; it has no usable one.

    The temporary folder of a first save that was killed is not a trace.
    """
    names = list_folder(folder)
    traces = [
        name
        for name in names
        if name.startswith(DAMAGED) or name in (POINTER, MEGATRON_POINTER, BEST)
    ]
    traces += [path.name for path in step_folders(folder)]

    if traces:
        raise UsageError(
            f"--save {folder}: no usable checkpoint is left there, but traces of earlier ones"
            f" ({some(traces)}); restore one from a backup, give the backup as --load, choose"
            " another --save, or give --resume never to start anew"
        )


def _candidates(folder: Path, state: ParallelState) -> list[Path]:
    """List the checkpoints rank 0 sees, newest first (others may see fewer on network disks)."""
    found = together(state, lambda: complete_checkpoints(folder) if state.is_main else None)

    if state.is_main:
        for path in step_folders(folder):
            if path not in found and path.is_dir():
                print(
                    f"note: {path} has no {MANIFEST}: not a checkpoint of this program, or"
                    " damaged; it is ignored",
                    flush=True,
                )

    return state.gather(found)[0]


def resumed_batch(path: Path | None) -> int:
    """Return the global batch size of the checkpoint to resume from, which is kept on any number of
    ranks; 0 without a checkpoint.
    """
    return read_manifest(path)["configs"]["run"]["global_batch_size"] if path else 0


def resumed_micro_batch(path: Path | None, share: int) -> int:
    """Return the micro-batch size of the checkpoint to resume from if it divides a rank's `share`
    of the global batch, else 0. With the same size a run resumes bit for bit.
    """
    before = read_manifest(path)["configs"]["run"]["micro_batch_size"] if path else 0
    return before if before and share % before == 0 else 0


def changed_settings(manifest: dict[str, Any], config: TrainConfig) -> list[str]:
    """List `name old -> new` for the settings that changed and that are worth a note."""
    before = {**defaults(config), **manifest["configs"]["run"]}
    changed = []

    for name in settings_by_resume(config, NOTE):
        now = getattr(config, name)
        if before[name] != now:
            changed.append(f"{name} {before[name]} -> {now}")

    return changed


def changed_rate(manifest: dict[str, Any], config: TrainConfig) -> str:
    """Describe how the learning rate jumps if a resumed run has another --train-iters; else ""."""
    before = manifest["configs"]["run"]
    step = manifest["iteration"]
    length = before["train_iters"]
    if length == config.train_iters or step >= config.train_iters:
        return ""

    noted = settings_by_resume(config, NOTE)
    old = dataclasses.replace(config, **{name: before[name] for name in noted if name in before})

    return (
        f"note: {length} steps become {config.train_iters}: the learning rate was"
        f" {learning_rate(step, old):.2e} at step {step} and is"
        f" {learning_rate(step + 1, config):.2e} at step {step + 1}, on the schedule of the new"
        " length"
    )


def defaults(config: Any) -> dict[str, Any]:
    """Return the default values of a configuration."""
    return {field.name: field.default for field in dataclasses.fields(config)}


def check_same_run(
    manifest: dict[str, Any],
    config: TrainConfig,
    model_config: ModelConfig,
    data: dict[str, Any],
    where: str,
) -> None:
    """Raise UsageError unless a checkpoint has the same model, data and order of samples.

    A setting that an older version did not have counts as its default.
    """
    check_same_model(manifest, model_config, data, where)
    before = {**defaults(config), **manifest["configs"]["run"]}

    for name in settings_by_resume(config, SAME):
        now = getattr(config, name)
        if before[name] != now:
            raise UsageError(
                f"{where}: made with {name} = {before[name]}, this run has {now}, so samples or"
                " losses would differ; use the same value, or another --save"
            )

    mined = data.get("mined", [])
    if manifest["data"].get("mined", mined) != mined:
        raise UsageError(
            f"{where}: mined negatives of {data['store']} have been added, removed or changed"
            " since, so samples would differ; put back what was there, or take only the weights by"
            " --init-from"
        )


def outputs_of_heads(data: dict[str, Any]) -> dict[str, Any]:
    """Return what the outputs of each task's head mean, without the settings of its samples."""
    heads = data.get("task_heads") or {}
    return {
        name: {key: value for key, value in head.items() if key != "settings"}
        for name, head in heads.items()
    }


def check_same_model(
    manifest: dict[str, Any], model_config: ModelConfig, data: dict[str, Any], where: str
) -> None:
    """Raise UsageError unless a checkpoint has the same model sizes, task and data."""
    theirs = {**defaults(model_config), **manifest["configs"]["model"]}
    ours = dataclasses.asdict(model_config)
    differing = [k for k in ours if theirs.get(k) != ours[k] and not k.endswith("dropout")]

    if differing:
        sizes = ", ".join(f"{k} {theirs.get(k)} against {ours[k]}" for k in differing)
        flags = [flag(name) for name in differing if hasattr(ModelSettings, name)]
        raise UsageError(
            f"{where}: made with other model sizes ({sizes}); use the same"
            f" {', '.join(['--model', *flags])}, vocabulary and data"
        )

    if manifest["data"].get("task") != data.get("task"):
        raise UsageError(
            f"{where}: a run of {manifest['data'].get('task') or 'pretraining'}; choose another"
            " --save, and start from its weights by --init-from"
        )

    if outputs_of_heads(manifest["data"]) != outputs_of_heads(data):
        raise UsageError(
            f"{where}: made with other answers to choose from; give the same files, or another"
            " --save and these weights by --init-from"
        )

    if manifest["data"]["vocabulary"] != data["vocabulary"]:
        raise UsageError(
            f"{where}: made with another vocabulary; give that vocabulary by --vocab-file"
        )

    if manifest["data"]["manifest_sha256"] != data["manifest_sha256"]:
        several = str(data.get("task") or "").startswith("multitask")
        what = "files or settings of its tasks have" if several else "the data has"
        raise UsageError(
            f"{where}: {what} changed since ({data['store']}), so samples would differ; give those"
            " of that run, or take only its weights by --init-from"
        )
