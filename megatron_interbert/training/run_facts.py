"""Collect what must be the same on all machines before a run starts."""

from typing import Any

from megatron_interbert.config.options import flag, rows
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.machines.facts import code_fingerprint, library_versions
from megatron_interbert.tasks.task import Job


def facts_of_run(config: TrainConfig, job: Job) -> dict[str, Any]:
    """Return all that a rank's work depends on, by human-readable names."""
    flags = {
        flag(name): getattr(config, name) for name, facts in rows(config) if not facts.may_differ
    }
    return {
        "code": code_fingerprint(),
        **library_versions(),
        "data": job.data["manifest_sha256"][:12],
        "vocabulary": job.data["vocabulary"][:12],
        "samples of an epoch": job.samples.order.epoch_length,
        **flags,
    }
