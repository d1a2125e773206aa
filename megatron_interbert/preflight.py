"""Check a long run before it starts, with its own flags; every failure says how to fix it.

`python -m megatron_interbert.preflight FLAGS --world-size N` on one machine checks environment,
batch arithmetic, data, disk and one step. Started by deepspeed, torchrun or
launchers/preflight.sbatch on all machines, it first compares them in a table that marks odd ones.
"""

import importlib.metadata
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from megatron_interbert.command_line import parse
from megatron_interbert.config.options import AUTO, option
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.order import check_partitions
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_writable, nearest_folder
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.machines.node_table import compare_nodes, device_in_use
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBert
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.launch import environment_of_one_process, read_launch
from megatron_interbert.parallel.state import COLLECTIVE_TIMEOUT, ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    vocabulary_of_run,
)
from megatron_interbert.tasks.pretraining.job import note_questions, open_labelled
from megatron_interbert.tasks.pretraining.questions import read_questions
from megatron_interbert.training.deepspeed_config import (
    agree_with_json,
    described_offload,
    merge,
)
from megatron_interbert.training.resume import (
    check_same_model,
    newest_manifest,
    newest_settings,
    take_fitted,
)
from megatron_interbert.training.trial_step import try_step

REQUIRED = {
    "torch": (2, 10),
    "deepspeed": (0, 19, 6),
    "h5py": (3, 11),
    "safetensors": (0, 6),
    "tokenizers": (0, 21),
}


@dataclass
class PreflightConfig(RunConfig):
    """Hold the flags of the run and two of preflight's own."""

    world_size: int = option(
        0, "processes the run will have; default: those started now", least=0, group="preflight"
    )
    fast: bool = option(
        False, "skip hashing the shards and reading every record", group="preflight"
    )

    by_trial: ClassVar[bool] = False  # --micro-batch-size auto


def check_environment(config: PreflightConfig) -> str:
    """Check versions, device and precision; return a summary."""
    for name, wanted in REQUIRED.items():
        version = importlib.metadata.version(name)
        if (
            tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
            < wanted
        ):
            raise UsageError(
                f"{name} {version} is older than {'.'.join(map(str, wanted))}; pip install -r"
                " requirements.txt"
            )

    device = this_device()
    if config.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"{torch.cuda.get_device_name()} does not support bfloat16; use --fp16")

    choose_kernels(config.kernels, device, fp8=config.fp8)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"

    return (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, deepspeed"
        f" {importlib.metadata.version('deepspeed')}, {name}"
    )


def check_batch(config: PreflightConfig) -> str:
    """Check batch arithmetic, DeepSpeed JSON and partitions at the run's size; return a summary."""
    config.check_ranks(config.world_size)
    ranks = ranks_of(config)
    config.data_parallel_size = ranks
    if config.resume != "never":
        take_fitted(config, newest_settings(config))
    config.fit_zero_stage(config.world_size)
    config.by_trial = config.micro_batch_size == AUTO

    if config.by_trial:  # the run tries which sizes fit; here the smallest stands for all
        agree_with_json(config)
        if not config.global_batch_size:
            raise UsageError("--micro-batch-size auto needs --global-batch-size, which it divides")
        config.micro_batch_size = 1

    engine = merge(config, ranks)
    if not config.is_default("data_partitions"):
        check_partitions(config.told("data_partitions"), config.data_partitions, ranks)
    if config.by_trial:
        return (
            f"global batch {config.global_batch_size}, micro-batches by trial when the run starts"
            f" (here the smallest is checked); DP {ranks}"
        )

    experts = config.expert_parallel_size
    divided = f", EP {experts}" if experts > 1 else ""

    return (
        f"global batch {config.global_batch_size} = micro {config.micro_batch_size} x DP {ranks} x"
        f" accumulation {engine['gradient_accumulation_steps']}; TP"
        f" {config.tensor_model_parallel_size}{divided}, ZeRO-{config.zero_stage}"
        f"{described_offload(engine)}"
    )


def check_data(config: PreflightConfig) -> str:
    """Check store and vocabulary, without --fast every hash and record too; return a summary."""
    corpus = open_labelled(config)
    tokenizer = vocabulary_of_run(config, config.stores())
    sizes = fitted_sizes(config, tokenizer, corpus, predicts_classes=corpus.has_labels)
    sizes.check_tensor_parallel(config.tensor_model_parallel_size)
    sizes.check_expert_parallel(config.expert_parallel_size)
    config.check_float8(sizes)
    config.check_routing(sizes)
    asked = read_questions(config, ParallelState())
    questions = asked.questions if asked is not None else None
    dataset = PretrainingSet(corpus, tokenizer, config, questions)
    if config.by_trial:
        config.check_share(config.global_batch_size // config.data_parallel_size)
        config.micro_batch_size = config.micro_batch_multiple
    else:
        config.check_routing_groups()

    some = np.arange(min(1000, corpus.num_captions))
    pieces = corpus.tokens(some, tokenizer, config.max_tokens - 2).ids
    unknown = int((pieces == tokenizer.unknown).sum())
    shards = sum(len(store.shards) for store in corpus.stores)
    batch = config.global_batch_size or config.micro_batch_size
    notes = [
        (
            f"{corpus.num_images} images, {corpus.num_captions} captions, {shards} shards,"
            f" vocabulary {tokenizer.vocab_size}"
        ),
        f"{unknown} [UNK] in the first {len(some)} captions"
        + (
            " (many: does the vocabulary match their language? see --vocab-file, --language)"
            if unknown > 0.02 * len(pieces)
            else ""
        ),
        f"{dataset.order.epoch_length / batch:.0f} steps an epoch",
    ]

    if any(store.captions.token_vocabulary != tokenizer.sha256 for store in corpus.stores):
        notes.append(
            "captions are tokenised while loading (build the store with this --vocab-file to avoid"
            " that)"
        )

    if not config.fast:
        for store in corpus.stores:
            store.verify_hashes()
        repaired = sum(count_repaired(store) for store in corpus.stores)
        notes.append(
            f"hashes right, {repaired} boxes outside their image, clipped when built or read"
        )

    return "; ".join(notes)


def count_repaired(store: RegionStore) -> int:
    """Count boxes that reach outside their image or are inverted, clipped when built or read.

    Reads, and so checks, every record.
    """
    for index in progress(
        range(store.num_images), desc="records", unit="image", unit_scale=True, leave=False
    ):
        store.read(index)

    return store.repaired_boxes + store.manifest.get("repaired_boxes", 0)


def check_disk(config: PreflightConfig) -> str:
    """Check that --save can be written and has room for the checkpoints to keep, and that a
    checkpoint to resume from fits the model; return a summary.
    """
    if not config.save:
        return "no --save: nothing will be written"

    check_writable(Path(config.save), "--save")
    corpus = open_labelled(config)
    tokenizer = vocabulary_of_run(config, config.stores())
    with torch.device("meta"):
        sizes = fitted_sizes(config, tokenizer, corpus, predicts_classes=corpus.has_labels)
        parameters = sum(p.numel() for p in InterBert(sizes, PRETRAINING_HEADS).parameters())

    resumed = newest_manifest(config) if config.resume != "never" else None
    if resumed:
        path, manifest = resumed
        data = describe_data(tokenizer, corpus)
        if asked := read_questions(config, ParallelState()):
            note_questions(data, asked, config)
        check_same_model(manifest, sizes, data, str(path))

    weight = 4 if not (config.fp16 or config.bf16) else 2
    # bytes: fp32 master weights and two moments; weights for DeepSpeed and as safetensors
    each = parameters * (12 + 2 * weight)
    wanted = each * (checkpoints_kept(config) + 1)  # the next one is whole before an old one goes
    free = shutil.disk_usage(nearest_folder(Path(config.save))).free

    if free < wanted:
        raise UsageError(
            f"--save {config.save}: {free / 2**30:.1f} GiB free, the checkpoints need"
            f" {wanted / 2**30:.1f} GiB; free some, choose another folder, or lower --keep-last"
        )

    unknown = not config.keep_last and not config.save_interval
    more = (
        f", and {each / 2**30:.2f} for each further one, because --keep-last 0 keeps all"
        if unknown
        else ""
    )
    start = f"resumes from {resumed[0]}; " if resumed else ""

    return (
        f"{start}{wanted / 2**30:.2f} GiB needed for checkpoints{more}, {free / 2**30:.1f} GiB free"
    )


def checkpoints_kept(config: PreflightConfig) -> int:
    """Return how many checkpoints are on disk at the end of a run; 1 where the clock decides."""
    steps = config.train_iters
    if not config.keep_last:
        return math.ceil(steps / (config.save_interval or steps))

    return config.keep_last + (steps // config.keep_every if config.keep_every else 0)


def check_step(config: PreflightConfig) -> str:
    """Try one training step on one process; return a summary."""
    return try_step(config, ranks_of(config))


def ranks_of(config: PreflightConfig) -> int:
    """Return the data-parallel size of the run."""
    return config.world_size // config.tensor_model_parallel_size


def check_nodes(config: PreflightConfig) -> None:
    """Compare the machines of several ranks, then run the other checks and end with their code.

    Rank 0 prints the table, then runs the checks in a separate process while the other ranks wait
    (for a launcher, the first rank that ends is the end of the run). Raises UsageError on all ranks
    if a machine is odd.
    """
    in_use = device_in_use(this_device())
    start_processes()
    state = ParallelState()
    table, wrong = compare_nodes(config, read_launch(), state, in_use)
    if state.is_main:
        print(table, flush=True)
    if wrong:
        raise UsageError(f"preflight: the machines do not fit together: {'; '.join(wrong)}")

    patient = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    code = 0

    if state.is_main:
        ranks = () if config.world_size else ("--world-size", str(state.world_size))
        command = [sys.executable, "-m", "megatron_interbert.preflight", *sys.argv[1:], *ranks]
        code = subprocess.run(command, env=environment_of_one_process(), check=False).returncode

    code = state.gather(code, patient)[0]
    sys.stdout.flush()
    os._exit(code)  # the checks have printed why


def run() -> None:
    """Run all checks in order; a failed one does not hide the next.

    Raises UsageError, and so exits with code 2, if any failed.
    """
    config = parse(
        PreflightConfig, "Check machines, environment, data and one step before a long run."
    )
    config.check()
    if read_launch().world_size > 1:
        check_nodes(config)

    config.world_size = config.world_size or 1
    checks: list[tuple[str, Callable[[PreflightConfig], str]]] = [
        ("environment", check_environment),
        ("batch", check_batch),
        ("data", check_data),
        ("disk", check_disk),
        ("step", check_step),
    ]
    failed = []

    for name, check in checks:
        needed = ("data", "batch") if name == "step" else ("data",)
        if missing := [other for other in needed if other in failed]:
            print(f"-       {name:<12} not tried: it needs '{missing[0]}'", flush=True)
            continue

        try:
            print(f"ok      {name:<12} {check(config)}", flush=True)
        except UsageError as error:
            failed.append(name)
            print(f"FAILED  {name:<12} {error}", flush=True)
        # out of memory, a missing package: still one line per check
        except (RuntimeError, ImportError, OSError) as error:
            failed.append(name)
            text = str(error).splitlines()[0] if str(error) else ""
            print(
                f"FAILED  {name:<12} {type(error).__name__}: {text}; if memory ran out, lower"
                " --micro-batch-size",
                flush=True,
            )

    if failed:
        raise UsageError(f"preflight: {', '.join(failed)} failed; see the lines above")

    print("ready")


def main() -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
