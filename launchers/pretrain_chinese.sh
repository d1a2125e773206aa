#!/usr/bin/env bash
""":"
# The Chinese model: as pretrain.sh, with the flags below for all that neither your flags nor your --config say. Without a data path it
# trains a small model on the generated sample shop (python tools/make_shop.py). Two languages in one file, see pretrain.sh.
exec deepspeed --log_level error ${LAUNCH_ARGS:-} "$0" "$@"
":"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SAMPLE = ("--model", "sample-chinese", "--data-path", "sample_shop/train", "--micro-batch-size", "32", "--lr", "2e-3",
          "--lr-warmup-fraction", "0.05", "--adam-beta2", "0.98", "--no-msm-on-mismatched", "--num-workers", "0")  # fmt: skip
RECIPE = ("--model", "base-chinese", "--language", "zh", "--lr", "1e-4", "--lr-warmup-fraction", "0.1", "--max-tokens", "64")

if __name__ == "__main__":
    from megatron_interbert.pretrain import main

    main(lambda told: RECIPE if "data_path" in told.given else SAMPLE)
