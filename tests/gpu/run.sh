#!/usr/bin/env bash
# Runs the acceptance tests of a new machine: all that only a GPU can show, on one GPU, in at most
# ten minutes. Prints a table; writes JSON. Exit codes: 0 all passed, 1 something failed, 2 wrong
# use.
#
#   bash tests/gpu/run.sh [--output FILE.json] [--stages a,b] [--pretend]
#
# A machine that cannot reach a package index but has torch, transformers, h5py and pytest brings
# the rest as wheels: WHEELS=FOLDER, or .whl/ in the checkout. Otherwise the tests' environment is
# made or reused: see launchers/environment.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

pretended=no
for word in "$@"; do
  case $word in --pretend | -h | --help) pretended=yes ;; esac
done

if [ $pretended = no ]; then # checked before making an environment, which takes minutes
  driver=
  for sign in /dev/nvidiactl /dev/dxg /dev/kfd /proc/driver/nvidia/version; do
    [ ! -e $sign ] || driver=yes
  done
  if [ -z "$driver" ] && ! command -v nvidia-smi rocm-smi >/dev/null; then
    echo "error: this machine shows no GPU (no driver of NVIDIA or AMD); start this on one that" \
      "has one, or add --pretend to run every stage on the CPU at tiny sizes" >&2
    exit 2
  fi
fi

wheels=${WHEELS:-}
[ -n "$wheels" ] || [ ! -d .whl ] || wheels=.whl
if [ -n "$wheels" ]; then
  if [ -z "$(find "$wheels" -maxdepth 1 -name '*.whl' 2>/dev/null | head -n 1)" ]; then
    echo "error: WHEELS=$wheels holds no wheels; fill it with pip download, or unset it" >&2
    exit 2
  fi
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$site" "$wheels"/*.whl || exit 2
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  python=python3
else
  . launchers/environment.sh
  python=python
fi
$python -m tests.gpu.acceptance "$@"
