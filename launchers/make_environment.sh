#!/usr/bin/env bash
# Makes the virtual environment FOLDER with the versions of requirements.txt; does nothing if it is
# ready. If requirements/*.lock fit, every file is checked against their hashes.
#
#   bash launchers/make_environment.sh FOLDER
#
# TORCH_INDEX is the package index of torch. Unset: pip's default, PyPI, whose torch brings CUDA.
# https://download.pytorch.org/whl/cpu has the build without CUDA. `none` uses the torch that python3
# already has, from a container or a cluster module, and leaves it alone. The choice is remembered.
#
# FOLDER/.megatron_interbert marks a folder made here: no other folder is ever emptied. Its lines are
# TORCH_INDEX and, once all is installed, a checksum of what was wanted. It is the first file made,
# and the lock between two concurrent starts.
set -euo pipefail

folder=$(realpath -m -- "${1:?usage: bash launchers/make_environment.sh FOLDER}")
mark=$folder/.megatron_interbert
log=$folder/install.log
cd "$(dirname "$0")/.."

refuse() { # wrong use: the user must decide
  echo "error: $*" >&2
  exit 2
}

give_up() { # an attempt failed
  echo "error: $*" >&2
  exit 1
}

ready() { # whether FOLDER holds what is wanted; sets `index` and `wanted`
  index=${TORCH_INDEX-$(sed -n 1p "$mark" 2>/dev/null || true)}
  # With the path: scripts of an environment that was moved would start the interpreter of the old place.
  local files=(requirements.txt requirements/*.lock setup.py)
  wanted=$({ cat "${files[@]}" 2>/dev/null || true; echo "$folder" "$index"; } | cksum)
  [ -x "$folder/bin/python" ] && [ "$(sed -n 2p "$mark" 2>/dev/null)" = "$wanted" ]
}

find_python() { # sets `python`: the first interpreter for which the pins have wheels
  local name
  # Not the interpreter of an activated environment but the one below it: FOLDER may be the former.
  local below='import sys
print("%s/bin/python%d.%d" % ((sys.base_prefix,) + tuple(sys.version_info[:2])))
sys.exit(not (3, 11) <= sys.version_info < (3, 15))'
  for name in python3 python3.13 python3.12 python3.11 python3.14; do
    python=$("$name" -c "$below" 2>/dev/null) && return
  done
  refuse "Python 3.11 to 3.14 is needed; python3 is $(python3 --version 2>&1 || true)"
}

check() { # refuses before anything is changed
  if [ -e "$folder" ] && [ ! -d "$folder" ]; then
    refuse "VENV=$folder is not a folder; set VENV to another place"
  fi
  if [ ! -e "$mark" ] && [ -e "$folder/.installed" ]; then
    refuse "VENV=$folder was made by an older version of this project;" \
      "remove it, or set VENV to another folder"
  fi
  if [ ! -e "$mark" ] && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
    refuse "VENV=$folder was not made by this project and is left unchanged;" \
      "remove it yourself, or set VENV to another folder"
  fi
  find_python
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    refuse "$python cannot make virtual environments;" \
      "on Debian and Ubuntu: apt-get install ${python##*/}-venv"
  [ "$index" != none ] || installed_torch "$python" >/dev/null 2>&1 ||
    refuse "TORCH_INDEX=none, but $python has no torch" \
      "(the torch of an activated virtual environment cannot be used)"
  mkdir -p "$folder" || refuse "VENV=$folder cannot be created; set VENV to another folder"
}

installed_torch() { # prints the torch of an interpreter as a pin
  "$1" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'
}

choose_lock() { # sets `lock`: cuda, common (for torch's CPU build), or empty with a note that says why
  lock=
  local misfit torch offered
  torch=$(torch_pin)
  misfit=$(comm -23 <(pins) <(awk '{ print $1 }' requirements/*.lock 2>/dev/null | sort) | head -n 1)
  if [ "$index" = none ]; then
    misfit="torch is taken from $python"
  elif [ -n "$misfit" ]; then
    misfit="$misfit of requirements.txt is not in requirements/*.lock (python tools/lock.py)"
  elif [[ "$(uname -sm)" != Linux\ @(x86_64|aarch64) ]]; then
    misfit="the locks are for Linux on x86_64 and aarch64"
  else
    # The index lists what it has, the best first; of equal versions a local build comes first.
    # An index without such a list may install torch all the same.
    "$folder/bin/python" -m pip --disable-pip-version-check index versions torch \
      ${index:+--index-url "$index"} >"$folder/torch.txt" 2>>"$log" || true
    offered=$(tr -s ' ,' '\n' <"$folder/torch.txt" |
      grep -xm 1 -e "${torch#torch==}" -e "${torch#torch==}+.*" || true)
    [ -s "$folder/torch.txt" ] || offered=unknown
    case $offered in
      unknown) misfit="the index does not list its versions of torch" ;;
      *+cpu) lock=common ;;
      *+* | "") misfit="the index has torch ${offered:-in another version}" ;;
      *) lock=cuda ;;
    esac
  fi
  [ -n "$lock" ] || echo "note: installing without hashes, because no lock fits: $misfit"
}

pins() { # the lines of requirements.txt as the locks write them
  sed -E 's/[[:space:]]*(#.*)?$//; /^$/d' requirements.txt | tr 'A-Z_' 'a-z-' | sort
}

torch_pin() {
  pins | grep '^torch=='
}

pip() { # its errors go to the log; if it fails, the user gets one line
  "$folder/bin/python" -m pip --disable-pip-version-check "$@" 2>>"$log" && return
  local said
  said=$(culprit "DO NOT MATCH THE HASHES")
  [ -z "$said" ] ||
    refuse "$said does not have the hash that ${lock:+requirements/*.lock or }its index gives:" \
      "damaged in transit, or from another index (see pip config list). pip's output: $log"
  said=$(culprit "--require-hashes mode")
  [ -z "$said" ] ||
    refuse "requirements/*.lock lack a version or a hash of ${said%% from *}:" \
      "python tools/lock.py regenerates them. pip's output: $log"
  if grep -q "connection broken by" "$log"; then
    give_up "the package index cannot be reached (check the network and HTTPS_PROXY);" \
      "run the same command again. pip's output: $log"
  fi
  give_up "pip: $(grep -im 1 '^error' "$log" || echo "ended without an error message"). Its output: $log"
}

culprit() { # prints the first file that pip names after a line of its log
  sed -nE "/$1/{n;s/^ *//;s/ (\\(from|--hash).*//p;q}" "$log"
}

install() { # pip install ARGUMENTS
  pip install "$@" >>"$log"
}

make_environment() {
  local below=()
  [ "$index" != none ] || below=(--system-site-packages)
  "$python" -m venv ${below[@]+"${below[@]}"} "$folder" >"$log" 2>&1 ||
    give_up "$python -m venv: $(grep -im 1 error "$log" || tail -n 1 "$log")"
}

install_all() {
  if [ -n "$lock" ]; then
    install_locked
  else
    install_unlocked
  fi
  install --no-build-isolation --no-deps -e .
}

install_locked() {
  local wanted=$folder/requirements.txt
  # First and alone, from its own index. The locks have no hash of the CPU build.
  if [ "$lock" = common ]; then
    echo "note: the index has torch's CPU build, which has no hash in the locks; all else is checked"
    install --no-deps ${index:+--index-url "$index"} "$(torch_pin)"
  else
    locked torch >"$wanted"
    install --no-deps ${index:+--index-url "$index"} --require-hashes -r "$wanted"
  fi
  installed_torch "$folder/bin/python" >"$folder/torch.txt"

  # Then what builds source packages: pip would fetch it without checking a hash.
  locked setuptools >"$wanted"
  install --require-hashes -r "$wanted"
  install --require-hashes --no-build-isolation --use-pep517 -r "requirements/$lock.lock"
}

locked() { # prints the lines of a package in the locks
  awk -v begin="$1==" 'index($0, begin) == 1 { on = 1 } on { print } !/\\$/ { on = 0 }' \
    requirements/*.lock
}

install_unlocked() {
  if [ "$index" = none ]; then
    # An image's constraints pin everything in it; only its torch must stay.
    unset PIP_CONSTRAINT
  else
    # First and alone: otherwise another package's range would choose the build.
    install ${index:+--index-url "$index"} "$(torch_pin)"
  fi
  installed_torch "$folder/bin/python" >"$folder/torch.txt"

  # If torch has brought a triton, ours is left out: ROCm's has another name and the same files.
  local there=torch
  "$folder/bin/python" -c 'from importlib.util import find_spec as f; exit(not f("triton"))' &&
    there="torch|triton"
  grep -vE "^($there)==" requirements.txt >"$folder/requirements.txt"

  install -c "$folder/torch.txt" "setuptools>=77" -r "$folder/requirements.txt"
}

mend_scripts() { # rewrites `#!` lines that pip copies as they are, like DeepSpeed's: they allow no space
  local script
  { grep -lsF "#!$folder/bin/python" "$folder"/bin/* || true; } | while IFS= read -r script; do
    cat - <(tail -n +2 "$script") >"$folder/script" <<END
#!/bin/sh
'''exec' "$folder/bin/python" "\$0" "\$@"
' '''
END
    cat "$folder/script" >"$script"
  done
}

ready && exit
check

exec 9>>"$mark"
if ! flock -n 9; then
  echo "another start is making $folder: waiting for it"
  flock 9 || true # fails on a file system without locks
fi
ready && exit

echo "installing the pinned versions into $folder (a few minutes, once)"
echo "$index" >"$mark"
find "$folder" -mindepth 1 -maxdepth 1 ! -path "$mark" -exec rm -rf {} +
make_environment
choose_lock
install_all
mend_scripts
printf '%s\n' "$index" "$wanted" >"$mark"
echo "environment ready, with $(cat "$folder/torch.txt")"
