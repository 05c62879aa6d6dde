"""The engine's end of the channels to all web processes: entries go to the pools, results go back."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from inferpool.engine.arena import ArenaView
from inferpool.engine.channel import CLOSED, NOTHING
from inferpool.engine.offer_reader import EntryTaker, OfferReader
from inferpool.engine.records import ENDED, ENDED_FIELDS, REPLAY, SUSPECT, ProtocolError
from inferpool.engine.web_connection import Offered, WebConnection
from inferpool.errors import InferpoolError, InternalError, Overloaded, QueueFull
from inferpool.pool.ports import Inbox, Result

log = logging.getLogger(__name__)

MOST_UNREAD_BYTES: Final = 64 * 1024 * 1024
"""A web process that leaves so many bytes of records unread is given up."""


class EnginePort(EntryTaker):
    """Reads entries from web processes and offers them to the pools; the outbox of these pools.

    One thread reads from all web processes. `put` and `ended` come from the instances' threads; `connect` and
    `disconnect` from any thread.

    An entry that ran when an engine ended runs while nothing else does: the thread holds other entries back
    until then. So if the engine ends again, there is one entry to blame.
    """

    def __init__(self, clock: Callable[[], float], most_unread_bytes: int = MOST_UNREAD_BYTES) -> None:
        """`start` must be called before entries can come.

        A web process that leaves more than `most_unread_bytes` of records unread is given up.
        """
        self._most_unread_bytes = most_unread_bytes
        self._clock = clock
        self._inbox: Inbox | None = None
        self._reply: Callable[[Any], object] | None = None
        self._reader: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        # A socket pair and not an eventfd, because macOS has none.
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        # What other threads want of the reader's thread.
        self._calls: deque[Callable[[], None]] = deque()
        self._connections: dict[int, WebConnection] = {}
        self._readers: dict[int, OfferReader] = {}
        self._serial = 0
        self._offered: dict[int, Offered] = {}
        # For the reader's thread: what waits because of suspects, or because the queue was full.
        self._held: dict[int, Offered] = {}
        self._suspects: dict[int, Offered] = {}
        self._running_suspect = 0
        self._gated = False
        self._closing = False

    # Start and end.

    def start(self, inbox: Inbox, reply: Callable[[Any], object]) -> None:
        """Begin to read. Entries go to `inbox`.

        `reply` returns the reply to a question, both JSON values. It is called in the thread that reads, so
        it has to return within a millisecond.
        """
        self._inbox = inbox
        self._reply = reply
        self._reader = threading.Thread(target=self._read_all, name="engine port", daemon=True)
        self._reader.start()

    def connect(self, web: int, epoch: int, channel: socket.socket, arena: int) -> None:
        """Talk to a web process from now on. The port closes `channel` and the descriptor `arena`.

        An earlier connection to the same web process is closed. Raises OSError or ValueError if the arena
        cannot be mapped.
        """
        try:
            view = ArenaView(arena)
        except BaseException:
            channel.close()
            raise
        finally:
            os.close(arena)
        channel.setblocking(False)
        self._call(lambda: self._connect(web, epoch, channel, view))

    def disconnect(self, web: int) -> None:
        """Drop the entries of a web process, and close its channel. Does nothing if there is none."""
        self._call(lambda: self._disconnect(web))

    def close(self, timeout_s: float = 5.0) -> bool:
        """Send what waits to be sent, close every channel, and end the thread; False if that took longer.

        Close the pools before, so that every entry has its result.
        """
        if self._reader is None:
            self._closing = True
            self._read_all()
            return True
        self._call(self._begin_closing)
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    @property
    def unanswered(self) -> int:
        """How many entries have no result yet, or are read by a run."""
        return len(self._offered) + len(self._held) + len(self._suspects)

    # The outbox.

    def put(self, results: Sequence[Result]) -> None:
        """Send results to the web processes that wait for them, with one write for each web process."""
        by_web: dict[WebConnection, list[tuple[Offered, Result, bool]]] = {}
        need_reader = False
        for result in results:
            offered = self._offered.get(result.entry_id)
            if offered is None or offered.answered:
                continue
            runs_on = result.runs_on and not offered.over
            if runs_on:
                offered.answered = True
            else:
                del self._offered[result.entry_id]
            own = by_web.get(offered.connection)
            if own is None:
                own = by_web[offered.connection] = []
            own.append((offered, result, runs_on))
        for connection, own in by_web.items():
            with connection.lock:
                for offered, result, runs_on in own:
                    connection.append_result(offered, result, runs_on)
                if connection.send():
                    need_reader = True
        # Read last: the reader's thread sets this before it looks for entries that have not ended.
        if need_reader or self._gated:
            self._wake()

    def ended(self, entry_ids: Sequence[int]) -> None:
        """Tell the web processes that no run reads the blocks of these entries any more."""
        touched: list[WebConnection] = []
        need_reader = False
        for entry_id in entry_ids:
            offered = self._offered.get(entry_id)
            if offered is None:
                continue
            if not offered.answered:
                offered.over = True
                continue
            del self._offered[entry_id]
            connection = offered.connection
            with connection.lock:
                connection.outgoing += ENDED_FIELDS.pack(ENDED_FIELDS.size, ENDED, offered.web_id)
            if connection not in touched:
                touched.append(connection)
        for connection in touched:
            with connection.lock:
                if connection.send():
                    need_reader = True
        # Read last: the reader's thread sets this before it looks for entries that have not ended.
        if need_reader or self._gated:
            self._wake()

    # The reader's thread.

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except (BlockingIOError, InterruptedError):
            pass  # the thread is about to wake up anyway
        except OSError:
            pass  # the port is closed

    def _read_all(self) -> None:
        while not (self._closing and not self._flush_all()):
            for key, events in self._selector.select(1.0 if self._closing else None):
                reader = key.data
                if reader is None:
                    self._woken()
                    continue
                if events & selectors.EVENT_WRITE:
                    self._write(reader.connection)
                if events & selectors.EVENT_READ:
                    self._readable(reader)
            if self._gated:
                self._release_held()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            self._wake_reader.recv(4096)
        while self._calls:
            call = self._calls.popleft()
            try:
                call()
            except Exception:
                log.exception("a web process could not be connected or disconnected")
        for connection in list(self._connections.values()):
            if connection.closed:
                self._drop(connection)
            elif connection.waits_to_write:
                self._watch(connection)

    def _watch(self, connection: WebConnection) -> None:
        """Watch for what the connection needs next."""
        events = selectors.EVENT_READ
        with connection.lock:
            if connection.waits_to_write:
                events |= selectors.EVENT_WRITE
        if connection.closed:
            self._drop(connection)
        else:
            self._selector.modify(connection.socket, events, self._readers[connection.serial])

    def _write(self, connection: WebConnection) -> None:
        with connection.lock:
            connection.waits_to_write = False
            connection.send()
        if connection.serial in self._connections:
            self._watch(connection)

    def _flush_all(self) -> bool:
        """Whether something is still to be sent."""
        waiting = False
        for connection in list(self._connections.values()):
            self._send_to(connection)
            waiting = waiting or (
                connection.serial in self._connections and bool(connection.outgoing or connection.large)
            )
        return waiting

    def _begin_closing(self) -> None:
        self._closing = True

    def _connect(self, web: int, epoch: int, channel: socket.socket, arena: ArenaView) -> None:
        self._disconnect(web)
        self._serial += 1
        connection = WebConnection(web, epoch, self._serial, channel, arena, self._most_unread_bytes)
        reader = OfferReader(connection, self)
        self._connections[connection.serial] = connection
        self._readers[connection.serial] = reader
        self._selector.register(channel, selectors.EVENT_READ, reader)
        with connection.lock:
            connection.send()

    def _disconnect(self, web: int) -> None:
        for connection in list(self._connections.values()):
            if connection.web == web:
                self._drop(connection)

    def _drop(self, connection: WebConnection) -> None:
        """Close a connection, and cancel its entries. Runs may go on, and keep the arena mapped."""
        if self._connections.pop(connection.serial, None) is None:
            return
        del self._readers[connection.serial]
        with connection.lock:
            connection.closed = True
            connection.outgoing = bytearray()
            connection.large.clear()
        self._selector.unregister(connection.socket)
        connection.socket.close()
        for waiting in (self._held, self._suspects):
            for entry_id, offered in list(waiting.items()):
                if offered.connection is connection:
                    del waiting[entry_id]
        inbox = self._inbox
        # `copy` is one step; a list of the items may see another thread take one out meanwhile.
        for entry_id, offered in self._offered.copy().items():
            if offered.connection is connection and not offered.answered and inbox is not None:
                inbox.cancel(offered.entry.key, entry_id, "disconnected")

    def _readable(self, reader: OfferReader) -> None:
        connection = reader.connection
        if connection.serial not in self._connections:
            return
        count = reader.incoming.receive(connection.socket)
        if count == NOTHING:
            return
        if count == CLOSED:
            self._drop(connection)
            return
        try:
            reader.read_records()
        except ProtocolError as wrong:
            log.error("web process %d broke the protocol of its channel: %s", connection.web, wrong)
            self._drop(connection)
            return
        except Exception:
            log.exception("the records of web process %d could not be read", connection.web)
            self._drop(connection)
            return
        if connection.outgoing:
            with connection.lock:
                unusual = connection.send()
            if unusual:
                self._watch(connection)

    def _offer(self, entry_id: int, offered: Offered) -> bool:
        """Offer an entry to the pools, or answer its refusal. False if the queue has no room for a replay."""
        inbox = self._inbox
        entry = offered.entry
        assert inbox is not None  # the reader runs
        self._offered[entry_id] = offered
        try:
            inbox.offer(entry)
        except QueueFull as full:
            del self._offered[entry_id]
            if offered.flags & REPLAY:
                self._held[entry_id] = offered
                self._gated = True
                return False
            self._refuse(offered, full)
        except InferpoolError as refusal:
            del self._offered[entry_id]
            self._refuse(offered, refusal)
        except Exception:
            log.exception("an entry of %s/%d could not be offered", *entry.key)
            self._offered.pop(entry_id, None)
            self._refuse(offered, InternalError("the request could not be queued"))
        return True

    def _refuse(self, offered: Offered, error: InferpoolError) -> None:
        connection = offered.connection
        waited_s = max(0.0, self._clock() - offered.entry.arrived)
        with connection.lock:
            if not connection.closed:
                result = Result(0, None, error, waited_s)
                connection.append_error(offered.web_id, error, False, result)

    def _release_held(self) -> None:
        """Let suspects run one at a time while nothing else runs, and afterwards what waits behind them."""
        while self._suspects or self._running_suspect:
            if self._running_suspect in self._offered:
                return
            self._running_suspect = 0
            if self._offered:
                return
            if self._suspects:
                entry_id = next(iter(self._suspects))
                offered = self._suspects.pop(entry_id)
                if self._offer(entry_id, offered):
                    self._running_suspect = entry_id
                    self._send_to(offered.connection)
                    continue
                # The queue is full of nothing: the version cannot take the entry at all.
                del self._held[entry_id]
                self._refuse(offered, Overloaded("the queue has no room for this request"))
                self._send_to(offered.connection)
        touched: list[WebConnection] = []
        for entry_id, offered in list(self._held.items()):
            del self._held[entry_id]
            if offered.connection not in touched:
                touched.append(offered.connection)
            if not self._offer(entry_id, offered):
                if self._offered:
                    break  # a result will make room
                del self._held[entry_id]
                self._refuse(offered, Overloaded("the queue has no room for this request"))
        self._gated = bool(self._held)
        for connection in touched:
            self._send_to(connection)

    def _send_to(self, connection: WebConnection) -> None:
        if connection.serial not in self._connections:
            return
        with connection.lock:
            unusual = connection.send()
        if unusual:
            self._watch(connection)

    # What readers ask for, in the reader's thread.

    def has(self, entry_id: int) -> bool:
        """Whether an entry has come that has not ended."""
        return entry_id in self._offered or entry_id in self._held or entry_id in self._suspects

    def take(self, entry_id: int, offered: Offered) -> None:
        """Offer an entry to the pools, unless it has to wait because of suspects."""
        if offered.flags & SUSPECT:
            self._suspects[entry_id] = offered
            self._gated = True
        elif self._gated:
            self._held[entry_id] = offered
        else:
            self._offer(entry_id, offered)

    def cancel(self, entry_id: int, reason: str) -> None:
        """Drop an entry for which nobody waits any more, unless it has ended."""
        held = self._held.pop(entry_id, None) or self._suspects.pop(entry_id, None)
        if held is not None:
            self._refuse(held, InferpoolError("cancelled"))
            return
        offered = self._offered.get(entry_id)
        inbox = self._inbox
        if offered is not None and inbox is not None and not offered.answered:
            inbox.cancel(offered.entry.key, entry_id, reason)

    def answer(self, question: object) -> object:
        """The reply to a question of a web process; None if there is none."""
        return None if self._reply is None else self._reply(question)
