"""Generate the sample data of a run without --data-path, if they do not exist yet."""

import os
import subprocess
import sys
import time
from pathlib import Path

import megatron_interbert
from megatron_interbert.command_line import RECIPE
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.launch import number

MAKERS = {"sample_corpus/train": "make-sample", "sample_shop/train": "make-shop"}
PATIENCE = 600.0  # seconds that the other ranks wait for rank 0 to make the data


def make_missing_sample(config: RunConfig) -> None:
    """Make the sample corpus or shop of a run without --data-path; called by all ranks.

    Rank 0 makes it, the others wait until it exists. Raises UsageError on rank 0 if that fails.
    """
    by_user = not config.is_default("data_path") and config.origins.get("data_path") != RECIPE
    maker = MAKERS.get(config.data_path, "")
    there = Path(config.data_path) / MANIFEST
    if by_user or there.exists() or not maker:
        return

    if number("RANK", 0):
        deadline = time.monotonic() + PATIENCE
        while not there.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return

    folder = there.parents[1]
    print(f"{folder} is missing: it is generated first, by interbert {maker}", flush=True)
    checkout = str(Path(megatron_interbert.__file__).parents[1])
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "megatron_interbert", maker, "--output", str(folder)]
    made = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    if made.returncode:
        raise UsageError(f"{folder} could not be made; see the lines above, or give --data-path")
