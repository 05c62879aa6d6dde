"""Servers that are forked from a process with all imports: a start takes a fifth of the CPU time.

A server imports 700 modules, and a server of several processes does so in each of them. Most tests of real
servers test nothing of that. `start` lets one process for each test process import everything once, and fork
for each server. The supervisor of such a server forks its children, and replaces no interpreter. All else is
as usual: command line, variables, folder, descriptors, signals and `/proc/PID/cmdline`.

Tests of starts, memory, imports and patches that must come before an import use usual servers: forks share
the keys of hashes and pages of memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn

ROOT: Final = Path(__file__).parent.parent
MODULE: Final = "inferpool"
"""The only command that is forked: the patches of others must come before the imports."""
RUNNER: Final = "inferpool.child_process"
SUPERVISOR: Final = "inferpool.engine.supervisor"
PRELOADED: Final = (
    *("inferpool.cli", "inferpool.launch", "inferpool.app", "inferpool.server", SUPERVISOR, RUNNER),
    *("inferpool.web_process", "inferpool.engine_process", "inferpool.engine.spawn", "onnxruntime"),
    *("inferpool.backends.onnx.model", "inferpool.http.access.tls", "httptools", "uvloop"),
)
ROOM: Final = 4096
"""Bytes for a command line, which `/proc/PID/cmdline` shows."""
WIDTH: Final = 16
"""Characters of a number that is reported."""
HANDLED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


class ForkedProcess(subprocess.Popen[str]):
    """A process that another one has forked, with the methods of `Popen` that tests use."""

    def __init__(self, command: Sequence[str], pid: int, report: int, stderr: int) -> None:
        """`report` is a pipe, which gets the status of the process; the process writes to `stderr`."""
        self._child_created = False  # `Popen` itself waits for nothing
        self.args = list(command)
        self.pid = pid
        self.returncode: int | None = None  # type: ignore[assignment]
        self.stdin = self.stdout = None
        self.stderr = open(stderr)  # noqa: SIM115 - the test closes it
        self._report = report
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, report)

    def poll(self) -> int | None:
        """Return the exit status, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended; returns its exit status."""
        if self.returncode is None and not select.select([self._report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        with self._lock:
            if self.returncode is None:
                self.returncode = int(os.read(self._report, WIDTH))
            return self.returncode


def can_fork(command: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Return whether this command is the server, and no variable changes the interpreter."""
    return list(command[:3]) == [sys.executable, "-m", MODULE] and not any(
        name.startswith("PYTHON") and name != "PYTHONPATH" for name in environ
    )


def start(command: Sequence[str], environ: Mapping[str, str], cwd: Path | None) -> ForkedProcess:
    """Start a server with these variables beside those of this process."""
    plan = {
        "command": list(command),
        "environ": {**os.environ, **environ},
        "cwd": str(cwd or Path.cwd()),
    }
    request = os.memfd_create("plan")
    os.write(request, json.dumps(plan).encode())
    stderr, theirs = os.pipe()
    report, status = os.pipe()
    try:
        socket.send_fds(_preloader(), [b"."], [request, status, 0, 1, theirs])
    finally:
        for descriptor in (request, status, theirs):
            os.close(descriptor)
    return ForkedProcess(command, int(os.read(report, WIDTH)), report, stderr)


@cache
def _preloader() -> socket.socket:
    """Start the process that imports and forks; returns the socket to it. It ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environ = {name: text for name, text in os.environ.items() if not name.startswith("COVERAGE_")}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", str(theirs.fileno()), "." * ROOM],
            cwd=ROOT,
            env=environ | {"PYTHONPATH": str(ROOT)},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
    process.returncode = 0  # nothing waits for it
    return ours


# --- in the process that forks ------------------------------------------------------------------------------


def main() -> NoReturn:
    """Import all that a server may, then fork a server for each request until the tests end."""
    from inferpool.system.imports import no_collections, without_plugins

    asked = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(asked.fileno(), False)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Without it the runtime starts a thread, and a fork has none of the threads.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    without_plugins()
    with no_collections():
        for name in PRELOADED:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1, 8)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            asked.detach()
            try:
                _report(*descriptors)
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)


def _report(request: int, status: int, stdin: int, stdout: int, stderr: int) -> NoReturn:
    """Fork the server, wait for its end and report that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size = os.fstat(request).st_size
    plan = json.loads(os.pread(request, size, 0))
    pid = os.fork()
    if pid == 0:
        for standard, descriptor in enumerate((stdin, stdout, stderr)):
            os.dup2(descriptor, standard)
        os.closerange(3, 1 << 16)
        os.chdir(plan["cwd"])
        _become(plan["command"], plan["environ"])
    for descriptor in (request, stdin, stdout, stderr):
        os.close(descriptor)
    for standard in range(3):
        os.close(standard)
    os.write(status, f"{pid:{WIDTH}}".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended):{WIDTH}}".encode())
    os._exit(0)


def _become(command: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Do what a new interpreter would do with `command`, which is PYTHON -m MODULE ARGUMENT..."""
    _handle_signals()
    before = os.environ.get("PYTHONPATH", "").split(":")
    os.environ.clear()
    os.environ.update(environ)
    own = [path for path in sys.path[1:] if path not in before]
    sys.path[:] = [str(Path.cwd()), *filter(None, environ.get("PYTHONPATH", "").split(":")), *own]
    importlib.invalidate_caches()
    spawn: Any = importlib.import_module("inferpool.engine.spawn")
    spawn.subprocess = types.SimpleNamespace(
        Popen=_ForkedChild,
        DEVNULL=subprocess.DEVNULL,
        _args_from_interpreter_flags=subprocess._args_from_interpreter_flags,  # type: ignore[attr-defined]
    )
    os.execv = _execute
    _run(command)


def _execute(path: Any, command: Any) -> NoReturn:
    """Do in place of `os.execv` what that does, for the same interpreter."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names of descriptors
        with contextlib.suppress(OSError):
            if int(name) > 2 and not os.get_inheritable(int(name)):
                os.close(int(name))
    _handle_signals()
    _run(command)


class _ForkedChild(subprocess.Popen[bytes]):
    """A child of the supervisor that is a fork of it."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, *others: Any
    ) -> None:
        pipes = others[5:11]
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Later versions of Python warn of the locks of other threads; those of logs are made anew.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            os.dup2(pipes[0], 0)
            last = 3
            for kept in sorted(pass_fds):
                os.closerange(last, kept)
                last = kept + 1
            os.closerange(last, 1 << 16)
            for number in HANDLED:
                signal.signal(number, signal.SIG_DFL)
            gc.freeze()  # the descriptors of the supervisor's objects are closed already
            _run(args)
        self.pid = pid
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _handle_signals() -> None:
    """Answer signals as a new interpreter does."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(command: Sequence[str]) -> NoReturn:
    """Run PYTHON -m MODULE ARGUMENT... in this process, and end it."""
    _show(command)
    module, arguments = command[command.index("-m") + 1], command[command.index("-m") + 2 :]
    sys.modules.pop(module, None)  # a new interpreter has not imported what it runs
    sys.argv[:] = [module, *arguments]
    sys.orig_argv[:] = command
    sys.setswitchinterval(0.005)
    status = 1
    try:
        _patch()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            status = error.code or 0
        else:
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - printed, as an interpreter does
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _patch() -> None:
    """Patch this process as Python would at its start, by the module in `tests/servers/site`."""
    with contextlib.suppress(ImportError):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")


def _show(command: Sequence[str]) -> None:
    """Let `/proc/PID/cmdline` show this command, in the place of the argument that reserves room for it."""
    numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(numbers[45]), int(numbers[46])
    text = b"".join(part.encode() + b"\0" for part in command)[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


if __name__ == "__main__":
    main()
