"""Every layout goes on from the checkpoints of every other, all pairs: `python -m
tests.campaigns.topologies`.
"""

import tempfile
from pathlib import Path

from tests.training.test_topologies import ALL, check_layouts, write_corpus

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        check_layouts(*write_corpus(Path(folder)), every=1)
    print(f"{len(ALL)} layouts, {len(ALL) ** 2} pairs: losses, norms and every bit as expected")
