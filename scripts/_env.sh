# shellcheck shell=bash
# Sourced by the scripts beside it. They use two environments:
#
#   .venv       the server as a user runs it: a wheel built from this checkout, with the hot path compiled
#   .venv-test  the sources themselves, editable and interpreted, with the tools of the tests and the checks
#
# Each environment has a folder `installed` with one file for each thing in it. The file holds a digest of the
# sources of that thing. While the digest stays the same, a start installs nothing and needs no network.

# Python keeps the bytecode of each module that it imports. To compile all packages would take a minute, and without
# bytecode each of the hundreds of servers that tests start would compile the sources again.
unset PYTHONDONTWRITEBYTECODE

REPO="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
SERVE_VENV="$REPO/.venv"
VENV="$REPO/.venv-test"
FOUND_PYTHON=""

say() { printf '%s\n' "$*" >&2; }

# help "$@": if the first argument asks for help, print the comment at the top of the script and exit.
help() {
  case "${1:-}" in
    -h | --help)
      sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
  esac
}

# runtime: print the extra that brings ONNX Runtime for this machine: `gpu` with an NVIDIA driver, else `cpu`.
runtime() {
  if [[ -e /proc/driver/nvidia/version ]] || nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi
}

# containers: print the program that builds and reads images. The command `docker` may be there without an engine.
containers() {
  if docker info >/dev/null 2>&1; then echo docker; else echo podman; fi
}

# --- .venv-test ---------------------------------------------------------------------------------------------

# need EXTRA...: install the project into .venv-test, editable, with these extras.
need() {
  local missing=() extra extras other key
  has_pip || make_venv "$VENV" with-pip
  key="$(editable_key)"
  # A change of the project makes every extra out of date.
  [[ "$(cat "$VENV/installed/project" 2>/dev/null)" == "$key" ]] || rm -rf "$VENV/installed"
  for extra in "$@"; do
    [[ -e "$VENV/installed/$extra" ]] || missing+=("$extra")
  done
  if ((${#missing[@]} == 0)); then return; fi
  for extra in "${missing[@]}"; do
    other="$(other_runtime "$extra")"
    if [[ -n "$other" ]] && "$VENV/bin/python" -m pip show --quiet "$other" 2>/dev/null; then
      # The two builds of ONNX Runtime install the same files: removing one breaks the other.
      "$VENV/bin/python" -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu
      rm -f "$VENV/installed/cpu" "$VENV/installed/gpu"
    fi
  done
  extras="$(IFS=,; echo "${missing[*]}")"
  say "Installing inferpool[$extras] into $VENV; this takes minutes if packages must be downloaded ..."
  if [[ -e "$VENV/installed/project" ]]; then
    # The project is installed already: nothing is built again.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "inferpool[$extras]"
  else
    install_editable "$extras"
  fi
  mkdir -p "$VENV/installed"
  printf '%s\n' "$key" >"$VENV/installed/project"
  for extra in "${missing[@]}"; do touch "$VENV/installed/$extra"; done
}

has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

# fetch_packages EXTRA...: install the packages of these extras into .venv-test, without the project, which needs a
# compiler. `need` installs what this does not.
fetch_packages() (
  flags=()
  for extra in "$@"; do
    [[ -e "$VENV/installed/$extra" ]] || flags+=(--extra "$extra")
  done
  if ((${#flags[@]} == 0)); then return; fi
  cd -- "$REPO" && find_uv "$VENV" && use_settings_of_pip || return 0
  say "Installing the packages of the tests into $VENV ..."
  run_uv pip install --python "$VENV/bin/python" "${flags[@]}" --requirement pyproject.toml || true
)

# install_editable EXTRAS: by uv, which takes a third of pip's time; by pip if uv cannot, for example because a package
# is on an index that only pip asks.
install_editable() (
  cd -- "$REPO" || exit
  if find_uv "$VENV"; then
    use_settings_of_pip
    if run_uv pip install --python "$VENV/bin/python" --editable ".[$1]"; then return; fi
  fi
  say "uv cannot install the packages; pip tries it now ..."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
)

# The folder is part of the key: commands in bin/ hold their path, and do not survive a move.
editable_key() {
  { printf '%s\n' "$REPO" "$("$VENV/bin/python" -V)" "$(command -v cc gcc || true)"
    cat -- "$REPO"/{pyproject.toml,setup.py}
    find "$REPO/service" -name '*.c' -exec cat -- {} +
  } | sha256sum
}

other_runtime() {
  case "$1" in
    cpu) echo onnxruntime-gpu ;;
    gpu) echo onnxruntime ;;
  esac
}

# --- .venv --------------------------------------------------------------------------------------------------

# install_server EXTRA...: install the server and these extras into .venv, from a wheel with a compiled hot path.
install_server() {
  local packages wheel started=$SECONDS packages_job=""
  is_python "$SERVE_VENV/bin/python" || make_venv "$SERVE_VENV" without-pip
  packages="$(packages_key "$@")"
  wheel="$(wheel_key)"
  if is_installed packages "$packages" && is_installed wheel "$wheel"; then return; fi
  find_uv
  if ! is_installed packages "$packages"; then
    say "Installing the packages of inferpool[$(IFS=,; echo "$*")] into $SERVE_VENV ..."
    install_packages "$packages" "$@" &
    packages_job=$!
  fi
  if ! is_installed wheel "$wheel"; then build_wheel; fi
  if [[ -n "$packages_job" ]]; then wait "$packages_job"; fi
  if ! is_installed wheel "$wheel"; then
    run_uv pip install --python "$SERVE_VENV/bin/python" --no-deps --reinstall "$SERVE_VENV"/wheel/*.whl
    mark_installed wheel "$wheel"
  fi
  say "Everything is installed after $((SECONDS - started)) s; the next start installs nothing."
}

# install_benchmark_packages: add the packages of the tests, which the benchmarks use, to .venv. By pip, for PyTorch.
install_benchmark_packages() {
  local key
  key="$(packages_key test)"
  if is_installed test "$key"; then return; fi
  say "Installing the packages of the benchmarks into $SERVE_VENV; this takes minutes ..."
  "$SERVE_VENV/bin/python" -m pip install --quiet --disable-pip-version-check "inferpool[test]"
  mark_installed test "$key"
}

# The wheel stays in .venv/wheel. It is built again when a source, the compiler or INFERPOOL_COMPILED changes.
build_wheel() {
  local tools="$SERVE_VENV/build" source started=$SECONDS compiled="${INFERPOOL_COMPILED:-}"
  if [[ "$compiled" == 0 ]]; then
    say "Building the server without compiling its hot path (INFERPOOL_COMPILED=0) ..."
  elif ! has_compiler; then
    say "Warning: no C compiler with the headers of $("$SERVE_VENV/bin/python" -V): the hot path runs interpreted, and"
    say "  a request costs nearly twice the CPU time. To change that on Debian: apt-get install gcc libc6-dev python3-dev"
    [[ "$compiled" != 1 ]] || exit 1
    compiled=0
  else
    say "Compiling the server's hot path with mypyc; this takes half a minute on two cores ..."
  fi
  if [[ "$(cat "$tools/installed" 2>/dev/null)" != "$(tools_key)" ]]; then
    run_uv venv --clear --python "$SERVE_VENV/bin/python" "$tools"
    build_requirements | run_uv pip install --python "$tools/bin/python" --requirement -
    tools_key >"$tools/installed"
  fi
  # The copy keeps the checkout clean, and its C modules, which an editable installation built, out of the wheel.
  source="$(mktemp -d)"
  (cd -- "$REPO" && tar -cf - --exclude='*.so' --exclude='__pycache__' --exclude='*.egg-info' \
    pyproject.toml setup.py README.md LICENSE service) | tar -xf - -C "$source"
  rm -rf "$SERVE_VENV/wheel"
  if ! INFERPOOL_COMPILED="$compiled" "$UV" build --wheel --no-build-isolation --python "$tools/bin/python" \
    --out-dir "$SERVE_VENV/wheel" "$source" >"$SERVE_VENV/build.log" 2>&1; then
    rm -rf "$source"
    tail -n 40 "$SERVE_VENV/build.log" >&2
    say "The server cannot be built; $SERVE_VENV/build.log says why. INFERPOOL_COMPILED=0 builds without compiling."
    return 1
  fi
  rm -rf "$source"
  if [[ "$compiled" == 0 ]]; then
    say "The server is built after $((SECONDS - started)) s."
  elif [[ "$("$SERVE_VENV/bin/python" -m zipfile -l "$SERVE_VENV"/wheel/*.whl)" == *__mypyc* ]]; then
    say "The hot path is compiled after $((SECONDS - started)) s."
  else
    say "Warning: the hot path could not be compiled and runs interpreted; $SERVE_VENV/build.log says why."
  fi
}

# install_packages KEY EXTRA...: install the dependencies of the project, without the project itself.
install_packages() {
  local key="$1" started=$SECONDS extra flags=()
  shift
  for extra in "$@"; do
    flags+=(--extra "$extra")
    # The two builds of ONNX Runtime install the same files: removing one breaks the other.
    if [[ -n "$(other_runtime "$extra")" && -e "$SERVE_VENV/installed/$(other_runtime "$extra")" ]]; then
      run_uv pip uninstall --python "$SERVE_VENV/bin/python" onnxruntime onnxruntime-gpu
    fi
  done
  rm -f "$SERVE_VENV"/installed/onnxruntime*
  # pip is for the people who add packages: messages of the server name commands with it.
  run_uv pip install --python "$SERVE_VENV/bin/python" "${flags[@]}" --requirement "$REPO/pyproject.toml" pip
  mark_installed "onnxruntime$([[ " $* " != *" gpu "* ]] || echo -gpu)" "$key"
  mark_installed packages "$key"
  say "The packages are installed after $((SECONDS - started)) s."
}

is_installed() { [[ "$(cat "$SERVE_VENV/installed/$1" 2>/dev/null)" == "$2" ]]; }

mark_installed() {
  mkdir -p "$SERVE_VENV/installed"
  printf '%s\n' "$2" >"$SERVE_VENV/installed/$1"
}

packages_key() {
  { printf '%s\n' "$REPO" "$("$SERVE_VENV/bin/python" -V)" "$@"; cat -- "$REPO/pyproject.toml"; } | sha256sum
}

wheel_key() {
  { printf '%s\n' "$REPO" "$("$SERVE_VENV/bin/python" -V)" "${INFERPOOL_COMPILED:-}"
    ! has_compiler || command -v cc gcc || true
    cd -- "$REPO" || exit
    find service -type f \( -name '*.py' -o -name '*.pyi' -o -name '*.c' -o -name '*.h' \) -print0 | sort -z | xargs -0 sha256sum
    cat -- pyproject.toml setup.py
  } | sha256sum
}

tools_key() { { printf '%s\n' "$REPO" "$("$SERVE_VENV/bin/python" -V)"; build_requirements; } | sha256sum; }

build_requirements() {
  "$SERVE_VENV/bin/python" -c 'import sys, tomllib
for line in tomllib.load(open(sys.argv[1], "rb"))["build-system"]["requires"]: print(line)' "$REPO/pyproject.toml"
}

has_compiler() {
  command -v cc >/dev/null && [[ -e "$("$SERVE_VENV/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]]
}

# find_uv [FOLDER]: find uv on the PATH or in the environment, .venv by default; if there is none, install it there by
# pip. uv is to use the package index that pip would use.
find_uv() {
  local python venv="${1:-$SERVE_VENV}"
  python="$(find_python)"
  export UV_SYSTEM_CERTS=1
  if [[ -z "${UV_DEFAULT_INDEX:-}" ]]; then
    UV_DEFAULT_INDEX="$(pip_setting index-url)"
    if [[ -n "$UV_DEFAULT_INDEX" ]]; then export UV_DEFAULT_INDEX; fi
  fi
  if [[ -x "$venv/bin/uv" ]]; then UV="$venv/bin/uv"; else UV="$(command -v uv || true)"; fi
  if [[ -n "$UV" ]]; then return; fi
  say "Installing uv, the installer, into $venv ..."
  if ! "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check uv 2>/dev/null; then
    # No pip, or one from before its option --python.
    "$python" -c 'import ensurepip' 2>/dev/null || install_ensurepip "$python"
    "$venv/bin/python" -m ensurepip >/dev/null
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
  fi
  UV="$venv/bin/uv"
}

# use_settings_of_pip: let uv find local builds of PyTorch (find-links in pip.conf), which spare gigabytes of CUDA
# libraries, and keep the versions that pip is to keep.
use_settings_of_pip() {
  UV_FIND_LINKS="$(pip_setting find-links)" UV_CONSTRAINT="$(pip_setting constraint)"
  export UV_FIND_LINKS UV_CONSTRAINT
}

# pip_setting NAME: print a setting of pip, from its variables or its files. Several values are separated by commas.
pip_setting() {
  "$(find_python)" -m pip config list 2>/dev/null |
    sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | sed -e 's/\\n/,/g; s/^,//; s/ /,/g; q' || true
}

run_uv() { "$UV" --quiet "$@"; }

# --- Python -------------------------------------------------------------------------------------------------

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# make_venv FOLDER with-pip|without-pip
make_venv() {
  local python options=()
  python="$(find_python)"
  FOUND_PYTHON="$python"
  if [[ "$2" == without-pip ]]; then
    options+=(--without-pip)
  else
    # Debian has this part of Python in a package of its own.
    "$python" -c 'import ensurepip' 2>/dev/null || install_ensurepip "$python"
  fi
  is_python "$1/bin/python" || options+=(--clear)
  say "Making $1 with $("$python" -V) ..."
  "$python" -m venv "${options[@]}" "$1"
}

find_python() {
  local name
  if [[ -n "${FOUND_PYTHON:-}" ]]; then echo "$FOUND_PYTHON"; return; fi
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
