"""Rehearse the last rank of a run of each preset with experts, and compare its peak with the
planner's.

    python -m tests.campaigns.presets
"""

import tempfile
from pathlib import Path

from megatron_interbert.planning.search import GIB
from tests.virtual.test_dry_run import WITH_EXPERTS, rehearse_preset


def main() -> None:
    """Run the campaign; exit with code 1 if a peak is more than 10 % from the planner's."""
    worst = 0.0

    with tempfile.TemporaryDirectory() as folder:
        for preset, (ranks, expert, stage) in WITH_EXPERTS.items():
            one = rehearse_preset(Path(folder), preset)
            worst = max(worst, abs(one["peak"] / one["planned"] - 1))
            print(
                f"{preset} on {ranks} ranks, EP{expert}, ZeRO-{stage}: peak"
                f" {one['peak'] / GIB:.2f} GiB, planned {one['planned'] / GIB:.2f}",
                flush=True,
            )

    raise SystemExit(worst > 0.1)


if __name__ == "__main__":
    main()
