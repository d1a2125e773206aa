"""What must be the same on all machines of a run before it is worth starting."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

import megatron_interbert
from megatron_interbert.config import TrainConfig, flag
from megatron_interbert.tasks.task import Job

OF_A_NODE = ("data_path", "valid_data_path", "vocab_file", "tensorboard_dir")  # each machine may have them elsewhere


@cache
def code_fingerprint() -> str:
    """First digits of a hash over the Python files of this package: a git revision would not show uncommitted changes."""
    digest = hashlib.sha256()
    root = Path(megatron_interbert.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def library_versions() -> dict[str, str]:
    """Versions on which results depend."""
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy", "tokenizers")
    }


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
