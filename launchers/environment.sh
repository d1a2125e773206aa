# Sourced by quickstart.sh, serve_sample.sh and tests/run.sh: a virtual environment with the pinned
# versions comes first in PATH. VENV chooses its folder (default: .venv in the checkout),
# TORCH_INDEX the build of torch: see make_environment.sh.
VENV=$(realpath -m -- "${VENV:-.venv}")
bash launchers/make_environment.sh "$VENV" || exit
export PATH=$VENV/bin:$PATH
if ! command -v nvidia-smi >/dev/null 2>&1; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
