"""Reads the records of an engine: results, errors, requests for memory, replies to questions.

Nothing that an engine sends is trusted: it cannot make the web process read memory that the entry lacks.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any, Final

from inferpool.engine.channel import CLOSED, NOTHING, Incoming, RecordReader
from inferpool.engine.entry_blocks import EntryBlocks
from inferpool.engine.entry_sender import EntrySender
from inferpool.engine.event_loop import Loop
from inferpool.engine.full_queues import FullQueues
from inferpool.engine.questions import Questions
from inferpool.engine.records import (
    ASK_FIELDS,
    ENDED,
    ENDED_FIELDS,
    ERROR,
    ERROR_FIELDS,
    HELLO,
    INLINE,
    LAYOUT,
    LAYOUT_FIELDS,
    MOST_ROWS,
    NEED,
    NEED_FIELDS,
    REPLY,
    RESULT,
    RESULT_FIELDS,
    RUNS_ON,
    ProtocolError,
    check_hello,
    read_error,
    read_json,
)
from inferpool.engine.tensor_bytes import read
from inferpool.engine.tensor_layouts import Layout, read_layout
from inferpool.errors import NotReady, QueueFull
from inferpool.pool.ports import Result

log = logging.getLogger(__name__)

COPIED_BYTES: Final = 64 * 1024
"""Outputs of at most so many bytes are copied, so that their block is free at once."""
REFUSED_S: Final = 2.0
"""How long an entry is offered again to an engine that lacks its version.

What is known of a version that moves between engines comes by way of the supervisor, and may come later.
"""
LOOK_AGAIN_S: Final = 0.05
"""Pause before an entry that was refused is offered again."""
_NOWHERE: Final[list[Result]] = []


class ResultReceiver(RecordReader):
    """What one engine after another sends to a web process."""

    __slots__ = (
        "_blocks", "_clock", "_epoch", "_full", "_greeted", "_layouts", "_loop", "_questions",
        "_refused", "_results", "_sender", "_web",
    )  # fmt: skip

    def __init__(
        self,
        web: int,
        loop: Loop,
        clock: Callable[[], float],
        blocks: EntryBlocks,
        sender: EntrySender,
        full: FullQueues,
        questions: Questions,
        refused: Callable[[], None],
    ) -> None:
        """`web` is the number of the web process; `refused` is called if the engine lacks a version."""
        super().__init__()
        self._web = web
        self._loop = loop
        self._clock = clock
        self._blocks = blocks
        self._sender = sender
        self._full = full
        self._questions = questions
        self._refused = refused
        self._epoch = 0
        self._greeted = False
        self._layouts: dict[int, Layout] = {}
        # Where the present call of `receive` puts results.
        self._results = _NOWHERE

    def connect(self, epoch: int) -> None:
        """Expect the greeting of the engine of `epoch`."""
        self._epoch = epoch
        self._greeted = False
        self.incoming = Incoming()
        self._layouts = {}

    def receive(self, channel: socket.socket, results: list[Result]) -> str | None:
        """Read what has arrived, and add results that somebody waits for to `results`.

        Returns why the channel can be used no more; None if it can.
        """
        count = self.incoming.receive(channel)
        if count == NOTHING:
            return None
        if count == CLOSED:
            return "the engine closed the channel"
        self._results = results
        try:
            self.read_records()
            return None
        except ProtocolError as wrong:
            broken = str(wrong)
        except Exception:
            log.exception("the records of an engine could not be read")
            broken = "the records of the engine could not be read"
        finally:
            self._results = _NOWHERE  # outputs must not outlive their responses here
        log.error("the engine broke the protocol of its channel, which is closed: %s", broken)
        return broken

    def take_record(self, kind: int, at: int, length: int) -> None:
        """Take a record, as `RecordReader` says."""
        if kind == RESULT and self._greeted:
            self._read_result(at, length)
        else:
            self._read_other(kind, bytes(self.incoming.buffer[at : at + length]))

    def _read_result(self, at: int, length: int) -> None:
        buffer = self.incoming.buffer
        if length < RESULT_FIELDS.size:
            raise ProtocolError(f"a result of {length} bytes came")
        _, _, flags, number, rows, entry_id, queue_s, compute_s, batch_rows, offset, size = (
            RESULT_FIELDS.unpack_from(buffer, at)
        )
        blocks = self._blocks
        pending = blocks.pending.get(entry_id)
        if pending is None or not pending.sent or pending.runs_on:
            raise ProtocolError(f"a result of entry {entry_id} came, which the engine does not have")
        layout = self._layouts.get(number)
        if layout is None:
            raise ProtocolError(f"a result with the layout {number} came, which was not sent")
        if rows > MOST_ROWS:
            raise ProtocolError(f"a result of {rows} rows came")
        inputs = pending.layout
        if inputs is not None:
            row_bytes = -(-size // (pending.entry.rows or 1))
            # The estimate follows larger outputs at once, and smaller ones slowly.
            inputs.row_bytes = max(row_bytes, inputs.row_bytes - (inputs.row_bytes >> 6))
        held = False
        if flags & INLINE:
            if size != length - RESULT_FIELDS.size:
                raise ProtocolError(f"outputs of {size} bytes came in a record of {length} bytes")
            at += RESULT_FIELDS.size
            outputs = read(buffer[at : at + size], 0, size, layout, rows)
        else:
            blocks.check_outputs(pending, offset, size)
            arena = blocks.arena
            assert arena is not None  # the engine is attached
            if size <= COPIED_BYTES or flags & RUNS_ON:
                outputs = read(bytearray(arena.map[offset : offset + size]), 0, size, layout, rows)
            else:
                outputs = read(arena.map, offset, offset + size, layout, rows)
                held = True
        if pending.wanted:
            self._results.append(Result(entry_id, outputs, None, queue_s, compute_s, batch_rows))
        self._full.ended(pending.entry)
        if flags & RUNS_ON:
            pending.wanted = False
            pending.runs_on = True
        elif held and pending.wanted:
            blocks.hold(entry_id, pending)
        else:
            blocks.free(entry_id, pending)

    def _read_other(self, kind: int, record: bytes) -> None:
        blocks = self._blocks
        if not self._greeted:
            if kind != HELLO:
                raise ProtocolError(f"a record of kind {kind} came before the greeting")
            arena = blocks.arena
            assert arena is not None  # the engine is attached
            check_hello(record, self._web, self._epoch, arena.size)
            self._greeted = True
        elif kind == LAYOUT:
            _, _, number = _unpack(LAYOUT_FIELDS, record, more=True)
            layout = read_layout(record[LAYOUT_FIELDS.size :])
            if number >= 1 << 16:
                raise ProtocolError(f"a layout with the number {number} came")
            self._layouts[number] = layout
        elif kind == ERROR:
            self._read_error(record)
        elif kind == NEED:
            _, _, entry_id, size = _unpack(NEED_FIELDS, record)
            self._sender.give(entry_id, blocks.give(entry_id, size))
        elif kind == ENDED:
            _, _, entry_id = _unpack(ENDED_FIELDS, record)
            pending = blocks.pending.get(entry_id)
            if pending is None or not pending.runs_on:
                raise ProtocolError(f"the run of entry {entry_id} ended, which did not run on")
            blocks.free(entry_id, pending)
        elif kind == REPLY:
            _, _, number = _unpack(ASK_FIELDS, record, more=True)
            then = self._questions.take(number)
            self._loop.call_soon(then, read_json(record[ASK_FIELDS.size :]))
        else:
            raise ProtocolError(f"a record of kind {kind} came from an engine")

    def _read_error(self, record: bytes) -> None:
        _, _, flags, entry_id, queue_s, compute_s, batch_rows = _unpack(ERROR_FIELDS, record, more=True)
        pending = self._blocks.pending.get(entry_id)
        if pending is None or not pending.sent or pending.runs_on:
            raise ProtocolError(f"an error of entry {entry_id} came, which the engine does not have")
        error = read_error(record[ERROR_FIELDS.size :])
        if pending.wanted and isinstance(error, NotReady) and not flags & RUNS_ON:
            # The version may have moved to another engine, or be about to: `EngineClient.reroute` tells.
            now = self._clock()
            first = pending.refusal is None
            if first:
                pending.refused_until = now + REFUSED_S
            if now < pending.refused_until:
                pending.sent = False
                pending.refusal = error
                if first:
                    self._refused()
                else:
                    self._loop.call_later(LOOK_AGAIN_S, self._refused)
                return
        if isinstance(error, QueueFull):
            self._full.refused(pending.entry, error, self._clock())
        else:
            self._full.ended(pending.entry)
        if pending.wanted:
            self._results.append(Result(entry_id, None, error, queue_s, compute_s, batch_rows))
        if flags & RUNS_ON:
            pending.wanted = False
            pending.runs_on = True
        else:
            self._blocks.free(entry_id, pending)


def _unpack(fields: Any, record: bytes, *, more: bool = False) -> tuple[Any, ...]:
    """Return the fields of a record; raises ProtocolError if it is too short, or too long unless `more`."""
    if len(record) < fields.size or (len(record) > fields.size and not more):
        raise ProtocolError(f"a record of {len(record)} bytes came, expected {fields.size}")
    found: tuple[Any, ...] = fields.unpack_from(record)
    return found
