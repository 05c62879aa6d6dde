"""Remove from an environment the files of its packages that a server never reads: `slim.py ENVIRONMENT`.

Needs `strip` and `readelf` of binutils. Every library that is changed was loaded once after that.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

UNCHANGED = ("torch", "triton", "nvidia", "tensorrt_libs")
"""Packages whose libraries keep their symbols: they load beside a GPU driver only, which no build has."""

LOADS = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"


def main(environment: Path) -> None:
    """Say the megabytes of `environment` before and after."""
    [packages] = environment.glob("lib/python3*/site-packages")
    before = _size(environment)
    _remove_tests(packages)
    _remove_unlinked_runtime(packages)
    for library in _own_libraries(packages):
        _strip(library, environment / "bin" / "python3")
    sys.stdout.write(f"{environment}: {before / 1e6:.0f} MB, now {_size(environment) / 1e6:.0f} MB\n")


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*"))


def _remove_tests(packages: Path) -> None:
    for folder in [*packages.glob("**/tests"), packages / "onnx" / "backend" / "test"]:
        # A folder with code that is not a test has no such name: numpy/testing stays.
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unlinked_runtime(packages: Path) -> None:
    """Remove the library for programs in C from ONNX Runtime, whose Python module contains the same code."""
    folder = packages / "onnxruntime" / "capi"
    libraries = list(folder.glob("*.so*"))
    for library in folder.glob("libonnxruntime.so*"):
        if not any(f"[{library.name}]" in _dynamic(other) for other in libraries):
            library.unlink()


def _dynamic(library: Path) -> str:
    """The dynamic section of a library, which names the libraries that it needs."""
    return subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout


def _own_libraries(packages: Path) -> list[Path]:
    """The libraries that may be stripped.

    Folders called `*.libs` have libraries that auditwheel has changed, and strip damages them.
    """
    found = []
    for library in packages.glob("**/*.so"):
        top = library.relative_to(packages).parts[0]
        if top not in UNCHANGED and not top.endswith(".libs") and not library.is_symlink():
            found.append(library)
    return found


def _strip(library: Path, python: Path) -> None:
    """Remove the symbols that only a debugger reads; keep the library as it is unless it loads without them.

    ONNX Runtime's libraries for GPUs, which load beside a driver only, stay as they are.
    """
    smaller = library.with_name(f"{library.name}.stripped")
    shutil.copy2(library, smaller)
    subprocess.run(["strip", "--strip-unneeded", smaller], check=True)
    if smaller.stat().st_size < library.stat().st_size and _loads(smaller, python):
        smaller.replace(library)
    else:
        smaller.unlink()


def _loads(library: Path, python: Path) -> bool:
    return subprocess.run([python, "-c", LOADS, library], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
