#!/usr/bin/env bash
# Goes from nothing to a running shop: environment, generated shop, pretraining, a model finetuned for search, and from it one for
# topics, their indexes, the service, whose address is printed. Safe to run again: finished steps are skipped. STEPS is the length of
# the pretraining, which also names the folder of the runs (colours are learnt last: with fewer steps than the default they are missing),
# PROCESSES the number of GPUs or CPU processes that train, PORT the port; arguments go to the service.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh

steps=${STEPS:-12000}
processes=${PROCESSES:-$((gpus == 1 ? 1 : 2))}
data=sample_shop runs=runs/shop_$steps
[ -f $data/test/clicks.jsonl ] || python tools/make_shop.py --output $data
[ -f $data/train/hard_images.npy ] || python tools/mine_neighbours.py $data/train

train() { # on the visible GPUs, or on the CPU without any
  PROCESSES_PER_NODE=$processes python launchers/node.py "$@"
}
train launchers/pretrain_chinese.sh --micro-batch-size $((64 / processes)) --global-batch-size $((64 / processes * processes)) \
  --train-iters "$steps" --save "$runs/pretrained" --save-interval 1000 --log-interval 200

finetune() { # task, first weights, steps, peak learning rate, further flags
  train launchers/finetune.sh "$1" --init-from "$2" --save "$runs/$1" --train-iters "$3" \
    --lr "$4" --lr-decay-style linear --adam-beta2 0.98 --micro-batch-size $((32 / processes)) --global-batch-size $((32 / processes * processes)) --num-workers 0 \
    --data-path $data/train --valid-data-path $data/test --ema-decay 0 --log-interval 200 --eval-interval "$3" "${@:5}"
}
finetune product_search "$runs/pretrained" $((steps / 2)) 1e-3 --queries $data/train/queries.jsonl --valid-queries $data/test/queries.jsonl
finetune recommendation "$runs/product_search" $((steps * 3 / 4)) 5e-4 --topics $data/train/topics.jsonl --clicks $data/train/clicks.jsonl \
  --valid-topics $data/test/topics.jsonl --valid-clicks $data/test/clicks.jsonl

exec python -m megatron_interbert.serve --load "$runs/product_search" --load-recommendation "$runs/recommendation" \
  --data-path $data/test --items $data/test/items.jsonl --topics $data/test/topics.jsonl --image-folder $data/test/pictures \
  --port "${PORT:-8080}" "$@"
