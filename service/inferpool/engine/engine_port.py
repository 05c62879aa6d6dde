"""The engine's end of the channels to all web processes: entries go to the pools, results go back."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from inferpool.engine.arena import ALIGNMENT, HEADER_BYTES, ArenaView
from inferpool.engine.channel import CLOSED, NOTHING
from inferpool.engine.records import (
    ALONE,
    ASK,
    ASK_FIELDS,
    CANCEL,
    CANCEL_FIELDS,
    ENDED,
    ENDED_FIELDS,
    GIVE,
    GIVE_FIELDS,
    HEAD,
    HEAD_BYTES,
    HELLO,
    LAYOUT,
    LAYOUT_FIELDS,
    MOST_ID,
    MOST_ROWS,
    MOST_TENANT,
    OFFER,
    OFFER_FIELDS,
    PART_FIELDS,
    REASONS,
    REPLAY,
    REPLY,
    SUSPECT,
    ProtocolError,
    check_hello,
    check_length,
    json_record,
    read_json,
)
from inferpool.engine.tensor_layouts import (
    MOST_LAYOUTS,
    read,
    read_layout,
)
from inferpool.engine.web_connection import Offered, WebConnection
from inferpool.errors import InferpoolError, InternalError, Overloaded, QueueFull
from inferpool.pool.ports import Entry, Inbox, Part, Result

log = logging.getLogger(__name__)

MOST_UNREAD_BYTES: Final = 64 * 1024 * 1024
"""A web process that leaves so many bytes of records unread is given up."""
_ID_BITS: Final = 40
"""An entry's id here is its id in the web process, with the number of the connection before these bits."""
_MOST_PARTS: Final = 1 << 20


class EnginePort:
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
        touched: list[WebConnection] = []
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
            connection = offered.connection
            with connection.lock:
                connection.append_result(offered, result, runs_on)
            if connection not in touched:
                touched.append(connection)
        for connection in touched:
            with connection.lock:
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
                connection = key.data
                if connection is None:
                    self._woken()
                    continue
                if events & selectors.EVENT_WRITE:
                    self._write(connection)
                if events & selectors.EVENT_READ:
                    self._readable(connection)
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
            self._selector.modify(connection.socket, events, connection)

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
        self._connections[connection.serial] = connection
        self._selector.register(channel, selectors.EVENT_READ, connection)
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

    def _readable(self, connection: WebConnection) -> None:
        if connection.serial not in self._connections:
            return
        count = connection.incoming.receive(connection.socket)
        if count == NOTHING:
            return
        if count == CLOSED:
            self._drop(connection)
            return
        try:
            self._read_records(connection)
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

    def _read_records(self, connection: WebConnection) -> None:
        incoming = connection.incoming
        buffer = incoming.buffer
        at = incoming.start
        stop = incoming.stop
        length = 0
        while stop - at >= HEAD_BYTES:
            length, kind = HEAD.unpack_from(buffer, at)
            check_length(length)
            if stop - at < length:
                break
            if kind == OFFER and connection.greeted:
                self._read_offer(connection, buffer, at, length)
            else:
                self._read_other(connection, kind, bytes(buffer[at : at + length]))
            at += length
            length = 0
        if at == stop:
            incoming.start = incoming.stop = 0
        else:
            incoming.start = at
            incoming.make_room(length)

    def _read_offer(self, connection: WebConnection, buffer: bytearray, at: int, length: int) -> None:
        if length < OFFER_FIELDS.size:
            raise ProtocolError(f"an offer of {length} bytes came")
        (
            _, _, flags, id_bytes, priority, number, rows, parts, web_id, offset, nbytes, outputs_at,
            input_bytes, arrived, deadline, row_load, tenant, share, rank,
        ) = OFFER_FIELDS.unpack_from(buffer, at)  # fmt: skip
        arena = connection.arena
        end = at + length
        at += OFFER_FIELDS.size
        if (
            not 0 < web_id < MOST_ID
            or rows > MOST_ROWS
            or not arena.has_block(offset, nbytes)
            or not HEADER_BYTES <= outputs_at <= nbytes
            or outputs_at & (ALIGNMENT - 1)
            or at + id_bytes > end
            or not deadline > -math.inf
            or not 0 <= row_load < math.inf
            or not -math.inf < arrived < math.inf
            or tenant >= MOST_TENANT
            or not 0 < share < math.inf
        ):
            raise ProtocolError(f"an offer of entry {web_id} with impossible numbers came")
        entry_id = connection.serial << _ID_BITS | web_id
        if entry_id in self._offered or entry_id in self._held or entry_id in self._suspects:
            raise ProtocolError(f"entry {web_id} came again, before its end")
        request_id = buffer[at : at + id_bytes].decode("utf-8", "replace") if id_bytes else ""
        at += id_bytes
        if parts:
            entry = self._entry_of_parts(
                connection, bytes(buffer[at:end]), parts, entry_id, (offset, outputs_at), input_bytes,
                (arrived, deadline), priority, row_load, request_id,
            )  # fmt: skip
            for part in entry.parts:
                _mark(part.entry, tenant, share, rank)
            if entry.rows != rows:
                raise ProtocolError(f"entry {web_id} has {rows} rows, and parts of {entry.rows} rows")
        else:
            layout = connection.layouts.get(number)
            if layout is None or at != end:
                raise ProtocolError(f"an offer of entry {web_id} with an unknown layout came")
            # Objects of the entry's own are made in one call each: this runs for every request.
            entry = Entry(
                entry_id,
                layout.key,
                read(arena.map, offset + HEADER_BYTES, offset + outputs_at, layout, rows),
                rows,
                entry_id if flags & ALONE else layout.group,
                input_bytes,
                arrived,
                deadline,
                priority,
                layout.outputs,
                row_load,
                request_id,
            )
            entry.mark = arena.memory
            entry.mark_at = offset
        _mark(entry, tenant, share, rank)
        offered = Offered(connection, web_id, entry, flags, offset + outputs_at, offset + nbytes)
        if flags & SUSPECT:
            self._suspects[entry_id] = offered
            self._gated = True
        elif self._gated:
            self._held[entry_id] = offered
        else:
            self._offer(entry_id, offered)

    def _entry_of_parts(
        self,
        connection: WebConnection,
        record: bytes,
        count: int,
        entry_id: int,
        block: tuple[int, int],
        input_bytes: int,
        times: tuple[float, float],
        priority: int,
        row_load: float,
        request_id: str,
    ) -> Entry:
        """Return the entry whose parts are in `record`; `block` is its offset and where inputs end in it."""
        offset, inputs_end = block
        arrived, deadline = times
        arena = connection.arena
        parts: list[Part] = []
        at = total = 0
        if count > _MOST_PARTS:
            raise ProtocolError(f"an entry of {count} parts came")
        for _ in range(count):
            if at + PART_FIELDS.size > len(record):
                raise ProtocolError("an offer without all parts came")
            flags, number, rows, _, web_id, start, nbytes, part_load = PART_FIELDS.unpack_from(record, at)
            at += PART_FIELDS.size
            layout = connection.layouts.get(number)
            part_id = connection.serial << _ID_BITS | web_id
            if (
                layout is None
                or not 0 < web_id < MOST_ID
                or not 0 < rows <= MOST_ROWS
                or start & (ALIGNMENT - 1)
                or start < HEADER_BYTES
                or at + 4 * rows > len(record)
                or not 0 <= part_load < math.inf
            ):
                raise ProtocolError("an offer with an impossible part came")
            indices = memoryview(record[at : at + 4 * rows]).cast("I").tolist()
            at += 4 * rows
            total += rows
            inputs = read(arena.map, offset + start, offset + inputs_end, layout, rows)
            entry = Entry(
                part_id, layout.key, inputs, rows, part_id if flags & ALONE else layout.group, nbytes,
                arrived, deadline, priority, layout.outputs, part_load, request_id,
            )  # fmt: skip
            entry.part_of = entry_id
            entry.mark = arena.memory
            entry.mark_at = offset
            parts.append(Part(entry, indices))
        if at != len(record):
            raise ProtocolError("an offer with bytes after its parts came")
        rows_seen = {index for part in parts for index in part.row_indices}
        if len(rows_seen) != total or max(rows_seen) != total - 1:
            raise ProtocolError("an offer with parts that are not its rows came")
        if len({part.entry.id for part in parts} | {entry_id}) != count + 1:
            raise ProtocolError("an offer with two parts of one id came")
        first = parts[0].entry
        if any(part.entry.key != first.key for part in parts):
            raise ProtocolError("an offer with parts for several versions came")
        whole = Entry(
            entry_id, first.key, {}, total, first.group, input_bytes, arrived, deadline, priority,
            first.outputs, row_load, request_id, tuple(parts),
        )  # fmt: skip
        whole.mark = arena.memory
        whole.mark_at = offset
        return whole

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

    def _read_other(self, connection: WebConnection, kind: int, record: bytes) -> None:
        if not connection.greeted:
            if kind != HELLO:
                raise ProtocolError(f"a record of kind {kind} came before the greeting")
            check_hello(record, connection.web, connection.epoch, connection.arena.size)
            connection.greeted = True
        elif kind == LAYOUT:
            if len(record) < LAYOUT_FIELDS.size:
                raise ProtocolError("a layout without a number came")
            _, _, number = LAYOUT_FIELDS.unpack_from(record)
            if number >= MOST_LAYOUTS:
                raise ProtocolError(f"a layout with the number {number} came")
            connection.layouts[number] = read_layout(record[LAYOUT_FIELDS.size :])
        elif kind == CANCEL:
            self._cancel(connection, record)
        elif kind == GIVE:
            self._take_memory(connection, record)
        elif kind == ASK:
            if len(record) < ASK_FIELDS.size:
                raise ProtocolError("a question without a number came")
            _, _, number = ASK_FIELDS.unpack_from(record)
            question = read_json(record[ASK_FIELDS.size :])
            answer: object = None
            try:
                if self._reply is not None:
                    answer = self._reply(question)
            except Exception:
                log.exception("a question of web process %d could not be answered", connection.web)
            with connection.lock:
                connection.outgoing += json_record(ASK_FIELDS, REPLY, number, answer)
        else:
            raise ProtocolError(f"a record of kind {kind} came from a web process")

    def _cancel(self, connection: WebConnection, record: bytes) -> None:
        if len(record) != CANCEL_FIELDS.size:
            raise ProtocolError(f"a record of {len(record)} bytes came, expected {CANCEL_FIELDS.size}")
        _, _, number, web_id = CANCEL_FIELDS.unpack(record)
        if number >= len(REASONS):
            raise ProtocolError(f"a cancellation for the reason {number} came")
        entry_id = connection.serial << _ID_BITS | web_id
        held = self._held.pop(entry_id, None) or self._suspects.pop(entry_id, None)
        if held is not None:
            self._refuse(held, InferpoolError("cancelled"))
            return
        offered = self._offered.get(entry_id)
        inbox = self._inbox
        if offered is not None and inbox is not None and not offered.answered:
            inbox.cancel(offered.entry.key, entry_id, REASONS[number])

    def _take_memory(self, connection: WebConnection, record: bytes) -> None:
        """Write the outputs of an entry into the memory that the web process gives."""
        if len(record) != GIVE_FIELDS.size:
            raise ProtocolError(f"a record of {len(record)} bytes came, expected {GIVE_FIELDS.size}")
        _, _, web_id, offset, nbytes = GIVE_FIELDS.unpack(record)
        with connection.lock:
            large = connection.large.pop(web_id, None)
            if large is None:
                raise ProtocolError(f"memory for outputs of entry {web_id} came, which needs none")
            offered, result, size = large
            if not nbytes:
                error = Overloaded(f"there is no memory for {size} bytes of outputs; try again later")
                connection.append_error(web_id, error, False, result)
                return
            if nbytes < size or not connection.arena.has_block(offset, nbytes):
                raise ProtocolError(f"memory of {nbytes} bytes at {offset} came for outputs of {size} bytes")
            offered.outputs_at, offered.outputs_end = offset, offset + nbytes
            connection.append_result(offered, result, False)


def _mark(entry: Entry, tenant: int, share: float, rank: int) -> None:
    """Make an entry one of a tenant's."""
    entry.tenant = tenant
    entry.share = share
    entry.rank = rank
