# shellcheck shell=bash
# Sourced by the scripts beside it: the project's own virtual environment, `.venv`, kept up to date.
#
# What was installed is remembered in `.venv/installed/EXTRA`: what it was made from. As long as that is
# the same a start installs nothing, and asks the network nothing.

REPO="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$REPO/.venv"

say() { printf '%s\n' "$*" >&2; }

# need EXTRA...: have the project installed, editable, with these extras.
need() {
  local missing=() extra
  is_python "$VENV/bin/python" || make_venv
  for extra in "$@"; do
    [[ "$(cat "$VENV/installed/$extra" 2>/dev/null)" == "$(made_from)" ]] || missing+=("$extra")
  done
  if ((${#missing[@]})); then install_extras "${missing[@]}"; fi
}

# compile: have the hot path compiled of the sources as they are, where it was compiled of others.
compile() {
  if [[ "$("$VENV/bin/python" -c 'import inferpool; print(inferpool.HOT_PATH)')" == "out of date" ]]; then
    say "Compiling the hot path anew, as its sources have changed (INFERPOOL_COMPILED=0 spares this) ..."
    (cd -- "$REPO" && "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .)
  fi
}

# runtime: the extra that brings this machine's ONNX Runtime, `gpu` where there is an NVIDIA driver.
runtime() {
  if [[ -e /proc/driver/nvidia/version ]] || nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi
}

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The folder counts: the command in .venv/bin holds its path, and does not survive a move.
made_from() {
  printf '%s\n' "$REPO" "$("$VENV/bin/python" -V)" "$(cat -- "$REPO"/{pyproject.toml,setup.py} | cksum)" \
    "$(cat -- "$REPO"/service/*/*.c | cksum)" "$(command -v cc gcc || true)"
}

install_extras() {
  local extras other="" extra
  extras="$(IFS=,; echo "$*")"
  for extra in "$@"; do
    case "$extra" in
      cpu) other=gpu ;;
      gpu) other=cpu ;;
    esac
  done
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
  # The two builds of ONNX Runtime install the same files: taking one away breaks the other, so both go.
  if [[ -n "$other" ]] && "$VENV/bin/python" -m pip show --quiet "$(distribution "$other")" 2>/dev/null; then
    "$VENV/bin/python" -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu
    rm -f "$VENV/installed/cpu" "$VENV/installed/gpu"
  fi
  say "Installing inferpool[$extras] into $VENV; with packages to fetch and code to compile this takes minutes ..."
  (cd -- "$REPO" && "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]")
  mkdir -p "$VENV/installed"
  for extra in "$@"; do made_from >"$VENV/installed/$extra"; done
}

distribution() { if [[ "$1" == gpu ]]; then echo onnxruntime-gpu; else echo onnxruntime; fi; }

make_venv() {
  local python
  python="$(find_python)"
  # Debian packs this part of Python on its own.
  "$python" -c 'import ensurepip' 2>/dev/null || install_ensurepip "$python"
  say "Making $VENV with $("$python" -V) ..."
  if is_python "$VENV/bin/python"; then
    "$python" -m venv "$VENV"
  else
    "$python" -m venv --clear "$VENV"
  fi
}

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if is_python "$name"; then
      command -v "$name"
      return
    fi
  done
  say "Python 3.11 or later is needed and was not found. On Debian 12: apt-get install python3 python3-venv"
  exit 1
}

install_ensurepip() {
  local package
  package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  if ! command -v apt-get >/dev/null; then
    say "$1 cannot make virtual environments: its module ensurepip is missing. Install it, then start again."
    exit 1
  fi
  if [[ "$(id -u)" != 0 ]]; then
    say "$1 cannot make virtual environments yet. Run this, then start again:"
    say "  sudo apt-get install -y $package"
    exit 1
  fi
  say "Installing the Debian package $package, which virtual environments need ..."
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq "$package" >/dev/null 2>&1 || {
    apt-get update -qq >&2
    apt-get install -y -qq "$package" >&2
  }
}
