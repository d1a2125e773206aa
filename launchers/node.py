#!/usr/bin/env python3
"""Run `interbert launch` from a checkout, to start the ranks of a machine; once per node in Slurm.

srun --ntasks-per-node=1 python launchers/node.py -m megatron_interbert.pretrain FLAGS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.launch import main

if __name__ == "__main__":
    main()
