"""Train experts on every layout and compare with a plain loop: `python -m
tests.campaigns.experts`.
"""

import tempfile
from pathlib import Path

from tests.dist import run_on_ranks
from tests.training.test_experts import LAYOUTS, all_cases, check, expected_of

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        expected = expected_of(Path(folder))
        for processes in LAYOUTS:
            run_on_ranks(processes, check, *expected, all_cases(processes))

    print(f"{sum(len(all_cases(processes)) for processes in LAYOUTS)} layouts agree")
