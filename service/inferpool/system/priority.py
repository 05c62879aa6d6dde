"""Runs work that must not take cores from other threads of this process."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

LOW_PRIORITY: Final = 15
"""The nice value of such work: next to a thread of the usual priority it gets a thirtieth of a core."""

T = TypeVar("T")


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
            if sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
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
