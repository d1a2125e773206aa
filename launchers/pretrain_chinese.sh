#!/usr/bin/env bash
""":"
# Pretrains the Chinese model: as pretrain.sh, with the recipe of megatron_interbert/pretrain_chinese.py for settings that neither your
# flags nor your --config give. Without --data-path it trains a small model on the generated sample shop (python tools/make_shop.py).
# Two languages in one file, see pretrain.sh.
exec deepspeed --log_level error ${LAUNCH_ARGS:-} "$0" "$@"
":"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from megatron_interbert.pretrain_chinese import main

    main()
