#!/usr/bin/env bash
# Goes from nothing to a result in five to eight minutes on two cores: environment, generated sample
# corpus, pretraining with two processes (one if there is one GPU), zero-shot retrieval on unseen
# scenes. Safe to run again: finished steps are skipped. STEPS changes the length of the training,
# SCENES the size of the corpus, PROCESSES the number of processes.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh

steps=${STEPS:-5000}
processes=${PROCESSES:-$((gpus == 1 ? 1 : 2))}
micro_batch=$((processes > 1 ? 64 / processes : 32))
global_batch=$((64 / processes * processes))
run=runs/sample
[ -f sample_corpus/test/manifest.json ] ||
  python tools/make_sample.py --output sample_corpus --train-scenes "${SCENES:-20000}"

PROCESSES_PER_NODE=$processes python launchers/node.py launchers/pretrain.sh --model sample \
  --data-path sample_corpus/train --valid-data-path sample_corpus/test --language en \
  --train-iters "$steps" --micro-batch-size $micro_batch --global-batch-size $global_batch \
  --lr 2e-3 --lr-warmup-fraction 0.05 --adam-beta2 0.98 --no-msm-on-mismatched --num-workers 0 \
  --save "$run" --save-interval 1000 --eval-interval 500 --log-interval 100

python -m megatron_interbert.evaluate retrieval --zero-shot --load "$run" --data-path sample_corpus/test --language en

echo
echo "losses, rates and throughput:  tensorboard --logdir $run/tensorboard   (or $run/metrics.jsonl)"
echo "queries with their top images: $run/evaluation/retrieval/result.html"
