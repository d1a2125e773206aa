#!/usr/bin/env bash
""":"
# Two languages in one file: a shell replaces itself by the `exec` below, and Python reads this block as a docstring.
# LAUNCH_ARGS goes to the deepspeed launcher, for example LAUNCH_ARGS="--num_gpus 8 --hostfile hosts".
exec deepspeed --log_level error ${LAUNCH_ARGS:-} "$0" "$@"
":"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from megatron_interbert.finetune import main

    main()
