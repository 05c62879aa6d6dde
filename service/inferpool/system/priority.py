"""Runs work that must not take cores from other threads of this process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

LOW_PRIORITY: Final = 15
"""The nice value of such work: next to a thread of the usual priority it gets a thirtieth of a core."""

LOWEST_NICE: Final = 19

T = TypeVar("T")
_LOOK_S: Final = 0.001
"""Pause between two looks for the threads that work has started."""


def call_directly(work: Callable[[], T]) -> T:
    """Do `work` in this thread."""
    return work()


def at_low_priority(work: Callable[[], T]) -> T:
    """Do `work` in a thread of low priority, and wait for it; returns and raises what `work` does.

    The thread is a new one, because only a privileged process may raise a priority again. Threads that
    `work` starts have the low priority as well. Only Linux has priorities of threads.
    """
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            _lower(threading.get_native_id())
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the work was asked for
            failure.append(error)

    thread = threading.Thread(target=run, name="low priority", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    work_result: T = result[0]
    return work_result


def at_falling_priority(work: Callable[[], T], starts: int) -> tuple[T, bool]:
    """Do `work` in a thread whose priority falls once it has started `starts` threads, which keep theirs.

    The second result is False if any thread that was started meanwhile has the low priority: if other parts
    of the process start threads, those of `work` may come after the fall. Raises what `work` does.
    """
    before = _threads()
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the work was asked for
            failure.append(error)

    thread = threading.Thread(target=run, name="falling priority", daemon=True)
    thread.start()
    own = thread.native_id
    while thread.is_alive():
        if own is not None and len(_threads() - before - {own}) >= starts:
            _lower(own)
            break
        thread.join(_LOOK_S)
    thread.join()
    if failure:
        raise failure[0]
    return result[0], not any(_is_low(started) for started in _threads() - before - {own})


def run_only_on_idle_cores(pid: int) -> None:
    """Let a process run only while no other one wants its core, as far as the system allows it.

    Any thread of usual priority that wakes takes the core at once. The process must hold no lock that such
    a thread waits for. Source: sched(7), SCHED_IDLE.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, LOWEST_NICE)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def run_at_low_priority(pid: int) -> None:
    """Give a process the low priority, with which it gets a little of a core that others want."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, LOW_PRIORITY)


def _threads() -> set[int]:
    """The threads of this process, as the system numbers them."""
    try:
        return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


def _lower(thread: int) -> None:
    """Give a thread the low priority, unless its priority is lower already."""
    if sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError):
            if os.getpriority(os.PRIO_PROCESS, thread) < LOW_PRIORITY:
                os.setpriority(os.PRIO_PROCESS, thread, LOW_PRIORITY)


def _is_low(thread: int) -> bool:
    try:
        usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
        return os.getpriority(os.PRIO_PROCESS, thread) > usual
    except ProcessLookupError:
        return False
