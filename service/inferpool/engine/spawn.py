"""Starts the children of the supervisor, and what a child does first.

A child is a new interpreter: nothing is forked once a native library has threads. It ends with the
supervisor, however that ends, and leaves all signals to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.engine.control import ControlSocket, control_pair

SUPERVISED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that only the supervisor answers. A terminal or a service manager sends them to all processes."""
RUNNER: Final = "inferpool.child_process"
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


class Child(NamedTuple):
    """A process that the supervisor has started.

    Attributes:
        process: the process.
        control: the supervisor's end of the control socket.
        pidfd: becomes readable when the process has ended.
    """

    process: subprocess.Popen[bytes]
    control: ControlSocket
    pidfd: int

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self.process.pid

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close the descriptors; the process has ended and is reaped."""
        self.control.close()
        os.close(self.pidfd)


def spawn(module: str, oom_score: int) -> Child:
    """Start a process that runs `main` of `module`, with a control socket.

    If memory runs out, the kernel ends processes with a larger `oom_score` (0 to 1000) first. The parent sets
    the score: until a child did, the kernel would end others for the memory that the child's start takes.

    Raises OSError if no process can be started.
    """
    ours, theirs = control_pair()
    with theirs:
        command = [
            sys.executable,
            *_interpreter_flags(),
            "-m",
            RUNNER,
            module,
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        # The child inherits the mask, so that no signal reaches it before it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISED)
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with (
        contextlib.suppress(OSError, ValueError),
        Path(f"/proc/{process.pid}/oom_score_adj").open("r+") as file,
    ):
        if int(file.read()) < oom_score:  # lower scores need privileges
            file.seek(0)
            file.write(str(oom_score))
    return Child(process, ours, os.pidfd_open(process.pid))


def begin_child(name: str) -> ControlSocket:
    """The first step of a child: tie its life to the supervisor's, leave signals to it; its control socket.

    `name` is the name of the process in `ps`, at most 15 characters.
    """
    control, parent = int(sys.argv[1]), int(sys.argv[2])
    for number in SUPERVISED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISED)
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
    name_process(name)
    # The descriptor is inherited once, and never by a process that the child starts.
    os.set_inheritable(control, False)
    return ControlSocket(socket.socket(fileno=control))


def name_process(name: str) -> None:
    """Give this process a name in `ps -o comm`, at most 15 characters."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _interpreter_flags() -> list[str]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return list(flags)
