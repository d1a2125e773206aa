"""Rehearse the last rank of a run of each preset with experts, and compare its peak with the
planner's: `python -m tests.campaigns.presets`. Exits with code 1 if one is more than 10 % off.
"""

import tempfile
from pathlib import Path

from megatron_interbert.planning.search import GIB
from tests.virtual.test_dry_run import WITH_EXPERTS, rehearse_preset

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {preset: rehearse_preset(Path(folder), preset) for preset in WITH_EXPERTS}

    for preset, one in found.items():
        ranks, expert, stage = WITH_EXPERTS[preset]
        peaks = f"peak {one['peak'] / GIB:.2f} GiB, planned {one['planned'] / GIB:.2f}"
        print(f"{preset} on {ranks} ranks, EP{expert}, ZeRO-{stage}: {peaks}")

    raise SystemExit(any(abs(one["peak"] / one["planned"] - 1) > 0.1 for one in found.values()))
