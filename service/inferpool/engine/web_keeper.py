"""Keeps the web processes: starts them, and starts them again when they have ended."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from inferpool.engine.child_loop import ChildLoop, reap
from inferpool.engine.control import Message
from inferpool.engine.spawn import spawn
from inferpool.engine.supervised import SupervisedWeb
from inferpool.system.connection_counts import set_absent
from inferpool.system.listeners import address_of

log = logging.getLogger(__name__)

MODULE: Final = "inferpool.web_process"
OOM_SCORE: Final = 250
"""If memory runs out, the kernel ends engines first, whose requests run again in the next one; then web
processes, and the supervisor last."""
STARTS: Final = 3
"""How often the first web process may die before it listens, until the server gives up."""
FIRST_PAUSE_S: Final = 0.5
MOST_PAUSE_S: Final = 30.0
RETRY_S: Final = 1.0
"""Pause before the next try if the system has no process, memory or descriptor to give."""
EARLY_S: Final = 5.0
"""A web process that dies so soon after its start pauses before the next start."""


class WebKeeper:
    """Keeps the web processes from `start_all` until `drain`.

    Attributes:
        exit_status: 1 if a web process did not end well in the drain, else 0.
    """

    def __init__(
        self,
        loop: ChildLoop,
        clock: Callable[[], float],
        webs: Mapping[int, SupervisedWeb],
        listener: socket.socket,
        counts: int,
        descriptors: Sequence[int],
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        started: Callable[[SupervisedWeb], None],
        hear: Callable[[SupervisedWeb, Message], None],
        ended: Callable[[SupervisedWeb], None],
        restarted: Callable[[], None],
        gave_up: Callable[[], None],
    ) -> None:
        """Start nothing yet.

        Args:
            listener: takes the connections of clients.
            counts: the descriptor of the memory with the numbers of connections.
            descriptors: those that web processes get after `counts`.
            facts: what else web processes are told when they start.
            started: called with each process that has started.
            hear: called with the messages that are not for this keeper.
            ended: called when a process has ended, before anything follows from that.
            restarted: called when a process has ended that is started again.
            gave_up: called if the first processes end before one listens.
        """
        self.exit_status = 0
        self._loop = loop
        self._clock = clock
        self._webs = webs
        self._listener = listener
        self._counts = counts
        self._descriptors = descriptors
        self._settings = settings
        self._facts = facts
        self._started = started
        self._hear_other = hear
        self._ended = ended
        self._restarted = restarted
        self._gave_up = gave_up
        self._info: Mapping[str, str] = {}
        self._announced = False
        self._failed_starts = 0
        self._all_ended: Callable[[], None] | None = None

    def start_all(self) -> None:
        """Start all web processes."""
        for web in self._webs.values():
            self._start(web)

    def set_info(self, info: Mapping[str, str]) -> None:
        """Tell all web processes, and those that start later, which libraries engines have."""
        self._info = info
        for web in self._webs.values():
            if web.child is not None:
                web.child.control.send("info", {"info": info}, wait=False)

    def answer(self, web: int, answer: Mapping[str, Any]) -> None:
        """Send the answer to what a web process has asked, if it still runs."""
        child = self._webs[web].child
        if child is not None:
            child.control.send("answer", answer, wait=False)

    def drain(self, all_ended: Callable[[], None]) -> None:
        """Let all processes answer what they have accepted, and end; `all_ended` is called when they have."""
        self._all_ended = all_ended
        for web in self._webs.values():
            if web.child is not None:
                web.child.control.send("drain", wait=False)
        if not self._any_runs():
            all_ended()

    def kill_all(self) -> None:
        """End those that did not end by themselves in a drain."""
        for web in self._webs.values():
            if web.child is not None:
                log.error("web process %d did not end in time", web.number)
                web.child.kill()

    def _any_runs(self) -> bool:
        return any(web.child is not None for web in self._webs.values())

    def _start(self, web: SupervisedWeb) -> None:
        if self._all_ended is not None or web.child is not None:
            return
        self._set_absent(web)
        try:
            web.child = child = spawn(MODULE, OOM_SCORE)
        except OSError as error:
            log.error("web process %d cannot be started: %s", web.number, error)
            self._loop.after(RETRY_S, lambda: self._start(web))
            return
        web.started, web.listens, web.seen = self._clock(), False, 0
        child.control.send(
            "start",
            {
                "web": web.number,
                "webs": len(self._webs),
                "settings": self._settings,
                "info": self._info,
                "slot": web.number,
                **self._facts,
            },
            [self._listener.fileno(), self._counts, *self._descriptors],
            wait=False,
        )
        self._loop.watch(child, lambda message: self._hear(web, message), lambda: self._has_ended(web))
        self._started(web)

    def _set_absent(self, web: SupervisedWeb) -> None:
        """Let no other web process leave connections to this one."""
        set_absent(self._counts, web.number - 1, len(self._webs))

    def _hear(self, web: SupervisedWeb, message: Message) -> None:
        if message.kind == "listening":
            web.listens = True
            web.pause_s = 0.0
            if not self._announced:
                self._announced = True
                tls = self._settings["tls_certificate_file"] is not None
                log.info("listening on %s", address_of(self._listener, tls=tls))
        elif message.kind == "drained":
            self.exit_status = max(self.exit_status, message.values["status"])
        else:
            self._hear_other(web, message)

    def _has_ended(self, web: SupervisedWeb) -> None:
        assert web.child is not None
        how = reap(web.child)
        status = web.child.process.returncode
        lived_s = self._clock() - web.started
        web.child = None
        self._set_absent(web)
        self._ended(web)
        if self._all_ended is not None:
            if status != 0:
                self.exit_status = 1
                if status != 1:
                    log.error("web process %d %s while it drained", web.number, how)
            if not self._any_runs():
                self._all_ended()
            return
        self._restarted()
        log.error("web process %d %s; its clients lost their connections", web.number, how)
        if not web.listens and not self._announced:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                self._gave_up()
                return
        if lived_s < EARLY_S:
            web.pause_s = min(MOST_PAUSE_S, 2 * web.pause_s or FIRST_PAUSE_S)
            self._loop.after(web.pause_s, lambda: self._start(web))
        else:
            self._start(web)
