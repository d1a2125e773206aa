"""Read the flags of one task among several that a YAML file names, and tell which settings are its
own.
"""

import dataclasses
from typing import Any

from megatron_interbert.config.options import SAME, rows
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.config.yaml_file import flags_of
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import FinetuneConfig

# what a task may set for itself among the flags that all finetunings have; else it is the run's, if
# that was given one
OWN = ("max_tokens", "max_regions", "eval_batch_size")


def config_of(
    config: TrainConfig, file: str, name: str, kind: type[FinetuneConfig], given: Any
) -> FinetuneConfig:
    """Return the settings of a task: its own, given in a file, and the others of the run.

    Raises UsageError that names the file and the key for a flag that is not known, or that only the
    run can have.
    """
    where = f"{file}: {name}"
    if not isinstance(given, dict):
        raise UsageError(f"{where} is {given!r:.60}, expected flags with their settings")

    values = flags_of(kind, given, where)
    shared = {entry.name for entry in dataclasses.fields(FinetuneConfig)}.difference(OWN)
    for flag in values:
        if flag in shared:
            raise UsageError(f"{where}: '{flag}' is a flag of the whole run; give it there")

    own = kind(**values)
    of_run = shared.union(OWN).intersection(config.given).difference(values)
    for flag in of_run.union(shared):
        setattr(own, flag, getattr(config, flag, getattr(own, flag)))

    own.given = {*values, *of_run, "data_partitions"}
    own.data_partitions = 1  # until all tasks share a number
    if "data_path" not in values and config.data_path:
        own.data_path = config.data_path

    own.metric = ""
    own.data_parallel_size = config.data_parallel_size

    try:
        own.check()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error

    return own


def own_settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings that only this task has, and on which its samples depend beside its
    files.
    """
    of_all = {entry.name for entry in dataclasses.fields(FinetuneConfig)}.difference(OWN)
    return {
        name: getattr(config, name)
        for name, facts in rows(config)
        if facts.resume is SAME and name not in of_all
    }
