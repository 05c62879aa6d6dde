"""Threads that several clients share: none of them can keep all threads from the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from inferpool.errors import Overloaded
from inferpool.system.cpu_pace import PACE, yield_to_others


class FairThreads:
    """Runs the jobs of each client in order, and those of several clients in turn.

    One client gets `threads` threads at most. There is one thread more, so that the first job of another
    client starts at once, however long the jobs of the first client take.
    """

    def __init__(self, threads: int, name: str) -> None:
        """Start no thread before there is a job; `name` is the beginning of the threads' names."""
        self._most = threads
        self._name = name
        self._pool = self._make_pool()
        self._has_threads = False
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[_Job]] = {}
        self._running: dict[str, int] = {}
        self._busy = 0

    def of(self, client: str) -> Executor:
        """Return the executor for the jobs of one client."""
        return _ClientThreads(self, client)

    def submit(self, client: str, job: _Job) -> None:
        """Run `job` once it is the turn of its client; may be called from any thread.

        If the system has no thread for it, and there was none before, the job fails with Overloaded.
        """
        with self._lock:
            self._waiting.setdefault(client, deque()).append(job)
            self._start_jobs()

    def _start_jobs(self) -> None:
        """Start jobs while there are threads for them; the lock is held."""
        while self._busy <= self._most:
            client = next((name for name in self._waiting if self._running.get(name, 0) < self._most), None)
            if client is None:
                return
            jobs = self._waiting.pop(client)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs  # behind all others: it is their turn
            self._running[client] = self._running.get(client, 0) + 1
            self._busy += 1
            try:
                self._pool.submit(self._run, client, job)
                self._has_threads = True
            except RuntimeError:
                # The system has no more threads. The pool has queued the job all the same, so one of its
                # threads takes it later, if there is any.
                if not self._has_threads:
                    self._pool = self._make_pool()
                    self._forget(client)
                    job.future.set_exception(
                        Overloaded("the system has no thread for this request; try again later")
                    )

    def _run(self, client: str, job: _Job) -> None:
        try:
            PACE.step()
            job.run()
        finally:
            with self._lock:
                self._forget(client)
                self._start_jobs()

    def _forget(self, client: str) -> None:
        self._busy -= 1
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]

    def _make_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._most + 1, thread_name_prefix=self._name, initializer=yield_to_others)


class _Job:
    """A call whose result a future gets."""

    __slots__ = ("_arguments", "_function", "_options", "future")

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._options = options
        self.future: Future[Any] = Future()

    def run(self) -> None:
        """Make the call, unless the future has been cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function(*self._arguments, **self._options)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets the error
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _ClientThreads(Executor):
    """The executor of one client."""

    def __init__(self, threads: FairThreads, client: str) -> None:
        self._threads = threads
        self._client = client

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` once it is the client's turn."""
        job = _Job(fn, args, kwargs)
        self._threads.submit(self._client, job)
        return job.future
