# Sourced by quickstart.sh and tests/run.sh: a virtual environment with the pinned versions, made once and then reused.
# VENV chooses the folder (default: .venv in the checkout); it is made anew when requirements.txt has changed.
VENV=${VENV:-$PWD/.venv}
stamp=$VENV/.installed
wanted=$(cat requirements.txt setup.py | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing the pinned versions into $VENV (a few minutes, once)"
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
    echo "error: VENV=$VENV holds something that is no virtual environment; choose another folder" >&2
    exit 2
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 is older than 3.11" >&2; exit 2; }
  # Not the python3 of an activated environment: it may be the one that is removed here.
  base_python=$(python3 -c 'import sys; print(sys.base_prefix + "/bin/python3")')
  rm -rf "$VENV"
  "$base_python" -m venv "$VENV"
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  "$VENV/bin/pip" install -q "$(grep '^torch==' requirements.txt)"
  "$VENV/bin/pip" install -q setuptools -r requirements.txt
  "$VENV/bin/pip" install -q --no-build-isolation --no-deps -e .
  echo "$wanted" >"$stamp"
  echo "environment ready"
fi
export PATH=$VENV/bin:$PATH
gpus=$(python -c 'from megatron_interbert.errors import run_entry
from megatron_interbert.parallel.device import gpus
run_entry(lambda: print(gpus()))') || exit
# Else DeepSpeed says in each of its processes that it has found no GPU.
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
