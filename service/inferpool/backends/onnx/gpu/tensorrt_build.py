"""Builds an engine in a process of its own: `python -m inferpool.backends.onnx.gpu.tensorrt_build`, told by stdin of what.

It takes minutes, all of a card's attention, and libraries that nobody wants to see crash in a server. Nothing
is answered but a line on stdout that says what went wrong, if anything did.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

from inferpool.backends.base import LoadOptions, find_backend
from inferpool.errors import LoadError


def start_build(backend: str, file: Path, options: LoadOptions) -> subprocess.Popen[bytes]:
    """A process that builds `options.engine` of `file`; it has been told everything."""
    # Read when the libraries are loaded: without it products of FP32 round as TF32, whatever is asked for.
    environ = os.environ if options.tf32 else os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}
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
    """Block until the build has ended; raises LoadError with what it said if it has failed."""
    # stdin stays open for as long: by its end the process knows that nobody waits any more.
    with process:
        output = process.stdout.read() if process.stdout is not None else b""
    if process.returncode:
        said = output.decode(errors="replace").strip().splitlines()
        raise LoadError(said[-1] if said else f"the process that builds ended with {process.returncode}")


def main() -> int:
    """Load the model that stdin tells of, which builds the engine."""
    backend, file, options = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        find_backend(backend).load(file, options).close()
    except Exception as error:  # noqa: BLE001 - whatever it is, whoever started this wants to know
        sys.stdout.write(" ".join(str(error).split())[:500] or type(error).__name__)
        return 1
    return 0


def _end_with_stdin() -> None:
    # Not through the buffer, whose lock nobody may hold when the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
