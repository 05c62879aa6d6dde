"""Builds a TensorRT plan in a process of its own: `python -m inferpool.backends.onnx.gpu.tensorrt_build`.

*Experimental: TensorRT has not yet run on a GPU.*

A build takes minutes and the whole card, and its libraries must not crash a server. The process reads the
task from stdin. If the build fails, the process writes one line with the reason to stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

from inferpool.backends.base import LoadOptions
from inferpool.backends.registry import find_backend
from inferpool.errors import LoadError


def start_build(backend: str, file: Path, options: LoadOptions) -> subprocess.Popen[bytes]:
    """Start a process that builds the plan `options.gpu.tensorrt` of `file`."""
    # The libraries read this variable when they are loaded. Without it FP32 products always round to TF32.
    environ = os.environ if options.gpu.tf32 else os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "inferpool.backends.onnx.gpu.tensorrt_build"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ,
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((backend, file, options)))
    process.stdin.flush()
    return process


def await_build(process: subprocess.Popen[bytes]) -> None:
    """Block until the build has ended; raises LoadError with the process's reason if the build failed."""
    # stdin stays open until then. Its end tells the process that this server no longer waits.
    with process:
        output = process.stdout.read() if process.stdout is not None else b""
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines()
        raise LoadError(lines[-1] if lines else f"the build process ended with status {process.returncode}")


def main() -> int:
    """Load the model that stdin names; the load builds the plan."""
    backend, file, options = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        find_backend(backend).load(file, options).close()
    except Exception as error:  # noqa: BLE001 - the parent reports any error
        sys.stdout.write(" ".join(str(error).split())[:500] or type(error).__name__)
        return 1
    return 0


def _end_with_stdin() -> None:
    # Not through the buffer: its lock must be free when the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
