"""The generated data that a run takes when it is told none: made first where they are missing."""

import subprocess
import sys
import time
from pathlib import Path

from megatron_interbert.command_line import RECIPE
from megatron_interbert.config.training import RunConfig
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.launch import number

TOOLS = Path(__file__).resolve().parents[2] / "tools"  # of a checkout; an installed package has none
MAKERS = {"sample_corpus/train": "make_sample.py", "sample_shop/train": "make_shop.py"}
PATIENCE = 600.0  # seconds that the other ranks wait for the one that makes the data


def make_missing_sample(config: RunConfig) -> None:
    """Make the sample corpus or shop of a run without --data-path; called by all ranks.

    Rank 0 makes it, the others wait until it is there. UsageError when that fails.
    """
    by_user = not config.is_default("data_path") and config.origins.get("data_path") != RECIPE
    maker = TOOLS / MAKERS.get(config.data_path, "")
    there = Path(config.data_path) / MANIFEST
    if by_user or there.exists() or not maker.is_file():
        return

    if number("RANK", 0):
        deadline = time.monotonic() + PATIENCE
        while not there.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return

    folder = there.parents[1]
    print(f"{folder} is missing: it is generated first, by tools/{maker.name}", flush=True)
    made = subprocess.run([sys.executable, maker, "--output", folder], check=False)
    if made.returncode:
        raise UsageError(f"{folder} could not be made; see the lines above, or give --data-path")
