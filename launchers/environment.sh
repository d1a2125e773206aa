# Sourced by quickstart.sh, serve_sample.sh and tests/run.sh: puts a virtual environment with the
# pinned versions first in PATH. VENV is its folder (default: .venv in the checkout), TORCH_INDEX
# chooses the build of torch: see make_environment.sh.
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -m -- "${VENV:-$checkout/.venv}")
(cd "$checkout" && bash launchers/make_environment.sh "$VENV") || return
export PATH=$VENV/bin:$PATH
gpus=$(cd "$checkout" && python -c 'from megatron_interbert.errors import run_entry
from megatron_interbert.parallel.device import report_gpus
run_entry(report_gpus)') || return
# Otherwise each DeepSpeed process prints that it has found no GPU.
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
