"""Name what must be the same on all machines of a run before it is worth starting."""

import dataclasses
from typing import Any

from megatron_interbert.config import TrainConfig, flag
from megatron_interbert.machines.facts import code_fingerprint, library_versions
from megatron_interbert.tasks.task import Job

OF_A_NODE = ("data_path", "valid_data_path", "vocab_file", "tensorboard_dir")  # each machine may have them elsewhere


def facts_of_run(config: TrainConfig, job: Job) -> dict[str, Any]:
    """Everything on which the work of a rank depends, by names for people."""
    flags = {flag(f.name): getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in OF_A_NODE}
    return {
        "code": code_fingerprint(),
        **library_versions(),
        "data": job.data["manifest_sha256"][:12],
        "vocabulary": job.data["vocabulary"][:12],
        "samples of an epoch": job.samples.order.epoch_length,
        **flags,
    }
