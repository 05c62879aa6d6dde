"""The engine's side of a channel to one web process: what it sends, and which entries have not ended."""

from __future__ import annotations

import logging
import socket
import threading

from inferpool.engine.arena import ArenaView
from inferpool.engine.records import (
    ERROR,
    ERROR_FIELDS,
    INLINE,
    INLINE_BYTES,
    NEED,
    NEED_FIELDS,
    RESULT,
    RESULT_FIELDS,
    RUNS_ON,
    error_body,
    hello,
)
from inferpool.engine.tensor_bytes import encode, write
from inferpool.engine.tensor_layouts import LayoutTable
from inferpool.errors import InferpoolError, InternalError
from inferpool.pool.ports import Entry, Result

log = logging.getLogger(__name__)


class Offered:
    """An entry of a web process that has not ended.

    Attributes:
        connection: the connection to the web process.
        web_id: the entry's id in the web process.
        entry: the entry.
        flags: of its OFFER.
        outputs_at: where outputs begin in the arena.
        outputs_end: where the memory for them ends.
        answered: whether the entry has its result, while a run still reads its inputs.
        over: whether no run reads the inputs, although the result is still to come.
    """

    __slots__ = (
        "answered", "connection", "entry", "flags", "outputs_at", "outputs_end", "over", "web_id",
    )  # fmt: skip

    def __init__(
        self,
        connection: WebConnection,
        web_id: int,
        entry: Entry,
        flags: int,
        outputs_at: int,
        outputs_end: int,
    ) -> None:
        self.connection = connection
        self.web_id = web_id
        self.entry = entry
        self.flags = flags
        self.outputs_at = outputs_at
        self.outputs_end = outputs_end
        self.answered = False
        self.over = False


class WebConnection:
    """The channel to one web process.

    Attributes:
        web: the number of the web process.
        epoch: the epoch of this engine.
        serial: the number of the connection; no two connections of an engine have the same.
        socket: the socket.
        arena: the arena of the web process.
        most_unread: how many bytes of records it may leave unread.
        lock: guards all below.
        outgoing: what it has not been sent yet.
        output_layouts: the layouts of results.
        large: results that wait for memory, by the entry's id in the web process; with their bytes.
        closed: whether nothing is sent any more.
        waits_to_write: whether the reader's thread is to write when the socket can take more.
    """

    __slots__ = (
        "arena", "closed", "epoch", "large", "lock", "most_unread", "outgoing", "output_layouts", "serial",
        "socket", "waits_to_write", "web",
    )  # fmt: skip

    def __init__(
        self, web: int, epoch: int, serial: int, channel: socket.socket, arena: ArenaView, most_unread: int
    ) -> None:
        self.web = web
        self.most_unread = most_unread
        self.epoch = epoch
        self.serial = serial
        self.socket = channel
        self.arena = arena
        self.lock = threading.Lock()
        self.outgoing = bytearray(hello(web, epoch, arena.size))
        self.output_layouts = LayoutTable()
        self.large: dict[int, tuple[Offered, Result, int]] = {}
        self.closed = False
        self.waits_to_write = False

    def send(self) -> bool:
        """Write what the socket takes. True if the reader's thread has to take note of something.

        The caller holds the lock.
        """
        if self.closed or not self.outgoing:
            return False
        if self.waits_to_write:
            if len(self.outgoing) <= self.most_unread:
                return False
            log.error("web process %d does not read its results, and is given up", self.web)
            self.closed = True
            return True
        try:
            count = self.socket.send(self.outgoing)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError:
            self.closed = True
            return True
        if count == len(self.outgoing):
            self.outgoing.clear()
            return False
        del self.outgoing[:count]
        self.waits_to_write = True
        return True

    def append_result(self, offered: Offered, result: Result, runs_on: bool) -> None:
        """Add the record of a result to what is sent. The caller holds the lock."""
        if self.closed:
            return
        outputs = result.outputs
        error = result.error
        if outputs is not None and error is None:
            try:
                self._append_outputs(offered, result, runs_on)
                return
            except Exception as fault:
                log.exception("the outputs of %s could not be sent", result.entry_id)
                error = InternalError(f"the outputs could not be sent: {type(fault).__name__}")
        self.append_error(
            offered.web_id, error or InternalError("the model returned nothing"), runs_on, result
        )

    def _append_outputs(self, offered: Offered, result: Result, runs_on: bool) -> None:
        outputs = result.outputs
        assert outputs is not None  # the caller has looked
        rows = 0
        for tensor in outputs.values():
            shape = getattr(tensor, "shape", None)
            if shape:
                rows = shape[0]
                break
        layout = self.output_layouts.find(offered.entry.key, outputs, rows)
        if layout.sent < 0:
            self.outgoing += layout.record()
            layout.sent = self.epoch
        body = b""
        if layout.plain:
            size = layout.size(rows)
            if size <= INLINE_BYTES:
                body = encode(layout, outputs)
                size = len(body)
        else:
            body = encode(layout, outputs)
            size = len(body)
        flags = RUNS_ON if runs_on else 0
        if size <= INLINE_BYTES:
            self.outgoing += RESULT_FIELDS.pack(
                RESULT_FIELDS.size + size, RESULT, flags | INLINE, layout.number, rows, offered.web_id,
                result.queue_s, result.compute_s, result.batch_rows, 0, size,
            )  # fmt: skip
            self.outgoing += body
            return
        if offered.outputs_at + size > offered.outputs_end:
            if runs_on:
                raise ValueError("outputs of an entry that was answered before")
            self.outgoing += NEED_FIELDS.pack(NEED_FIELDS.size, NEED, offered.web_id, size)
            self.large[offered.web_id] = (offered, result, size)
            return
        if layout.plain:
            write(self.arena.map, offered.outputs_at, layout, outputs, rows)
        else:
            self.arena.map[offered.outputs_at : offered.outputs_at + size] = body
        self.outgoing += RESULT_FIELDS.pack(
            RESULT_FIELDS.size, RESULT, flags, layout.number, rows, offered.web_id,
            result.queue_s, result.compute_s, result.batch_rows, offered.outputs_at, size,
        )  # fmt: skip

    def append_error(self, web_id: int, error: InferpoolError, runs_on: bool, result: Result) -> None:
        """Add the record of an error to what is sent. The caller holds the lock."""
        body = error_body(error)
        fields = (
            *(ERROR_FIELDS.size + len(body), ERROR, RUNS_ON if runs_on else 0, web_id, result.queue_s),
            *(result.compute_s, result.batch_rows),
        )
        self.outgoing += ERROR_FIELDS.pack(*fields) + body
