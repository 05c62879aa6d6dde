"""Writes the records of a web process to its engine: offers, cancellations, memory given, questions."""

from __future__ import annotations

import socket
from collections.abc import Callable
from struct import pack
from typing import Final

from inferpool.engine.event_loop import Loop
from inferpool.engine.pending_entry import PendingEntry
from inferpool.engine.records import (
    ALONE,
    CANCEL,
    CANCEL_FIELDS,
    GIVE,
    GIVE_FIELDS,
    OFFER,
    OFFER_FIELDS,
    PART_FIELDS,
    REASONS,
    REPLAY,
    SUSPECT,
    check_length,
)
from inferpool.engine.tensor_layouts import Layout, LayoutTable
from inferpool.observe.metrics import Metrics

MOST_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Bytes of records that may wait for an engine that does not read."""
_MOST_ID_BYTES: Final = 256
"""Bytes of a request's id that the engine is told, for its log."""


class EntrySender:
    """The bytes that an engine is to get, and its socket.

    Attributes:
        channel: the socket to the engine; None while there is none.
        epoch: the epoch of the engine, or of the last one; 0 before the first.
        outgoing: what is not written yet.
        layouts: the layouts of entries.
        flush_planned: whether the loop will call `flush` soon.
    """

    __slots__ = (
        "_broken", "_loop", "_metrics", "_writer_added", "channel", "epoch", "flush_planned", "layouts",
        "outgoing",
    )  # fmt: skip

    def __init__(self, loop: Loop, broken: Callable[[str], None], metrics: Metrics | None) -> None:
        """`broken` is called with a reason if the socket cannot be written. Replays count in `metrics`."""
        self._loop = loop
        self._broken = broken
        self._metrics = metrics
        self._writer_added = False
        self.channel: socket.socket | None = None
        self.epoch = 0
        self.outgoing = bytearray()
        self.layouts = LayoutTable()
        self.flush_planned = False

    @property
    def is_behind(self) -> bool:
        """Whether the engine has left so much unread that it gets no more."""
        return len(self.outgoing) > MOST_WAITING_BYTES

    def connect(self, channel: socket.socket, epoch: int, greeting: bytes) -> None:
        """Write to the engine of `epoch` from now on, first `greeting`."""
        self.channel = channel
        self.epoch = epoch
        self.outgoing = bytearray(greeting)

    def disconnect(self) -> None:
        """Forget the socket, which the caller closes, and what is not written."""
        channel = self.channel
        if channel is not None and self._writer_added:
            self._loop.remove_writer(channel.fileno())
            self._writer_added = False
        self.channel = None
        self.outgoing = bytearray()

    # Records.

    def offer(self, pending: PendingEntry) -> None:
        """Send an entry whose inputs are in its block."""
        entry = pending.entry
        layout = pending.layout
        flags = 0
        number = 0
        if layout is not None:
            if layout.sent != self.epoch or layout.number < 0:
                self._send_layout(layout)
            number = layout.number
            if entry.group == entry.id:
                flags = ALONE
        if pending.accepted:
            pending.count(self._metrics, "replayed_entries_total")
            flags |= REPLAY | SUSPECT if pending.crashes else REPLAY
        request_id = entry.request_id.encode()
        if len(request_id) > _MOST_ID_BYTES:
            request_id = request_id[:_MOST_ID_BYTES]
        tail = request_id
        if pending.parts:
            for each in pending.parts:
                self._send_layout(each)
            tail = request_id + _part_records(pending)
        length = OFFER_FIELDS.size + len(tail)
        check_length(length)
        self.outgoing += OFFER_FIELDS.pack(
            length, OFFER, flags, len(request_id), min(entry.priority, 0x7FFFFFFF), number, entry.rows,
            len(pending.parts), entry.id, pending.offset, pending.nbytes, pending.outputs_at, entry.nbytes,
            entry.arrived, entry.deadline, entry.row_load, entry.tenant, entry.share,
            min(entry.rank, 0x7FFFFFFF),
        )  # fmt: skip
        if tail:
            self.outgoing += tail
        pending.sent = True

    def cancel(self, entry_id: int, reason: str) -> None:
        """Tell the engine that nobody waits for an entry; `reason` is one of `REASONS`."""
        self.outgoing += CANCEL_FIELDS.pack(CANCEL_FIELDS.size, CANCEL, REASONS.index(reason), entry_id)

    def give(self, entry_id: int, pending: PendingEntry) -> None:
        """Tell the engine where it may write the outputs of an entry: in the memory given last, if any."""
        fields = (GIVE_FIELDS.size, GIVE, entry_id, pending.more_at, pending.more_bytes)
        self.outgoing += GIVE_FIELDS.pack(*fields)

    def _send_layout(self, layout: Layout) -> None:
        if layout.number < 0:
            self.layouts.renumber(layout)
        if layout.sent != self.epoch:
            self.outgoing += layout.record()
            layout.sent = self.epoch

    # Writing.

    def plan_flush(self) -> None:
        """Let the loop call `flush` soon."""
        if not self.flush_planned:
            self.flush_planned = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what is not written yet, as far as the socket takes it."""
        self.flush_planned = False
        channel = self.channel
        if channel is None or self._writer_added or not self.outgoing:
            return
        try:
            count = channel.send(self.outgoing)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            self._broken(f"the engine closed the channel: {error}")
            return
        if count == len(self.outgoing):
            self.outgoing.clear()
        else:
            del self.outgoing[:count]
            self._writer_added = True
            self._loop.add_writer(channel.fileno(), self._writable)

    def _writable(self) -> None:
        channel = self.channel
        if channel is not None and self._writer_added:
            self._loop.remove_writer(channel.fileno())
            self._writer_added = False
            self.flush()


def _part_records(pending: PendingEntry) -> bytes:
    pieces: list[bytes] = []
    for part, layout, start in zip(pending.entry.parts, pending.parts, pending.starts, strict=True):
        entry = part.entry
        flags = ALONE if entry.group == entry.id else 0
        pieces.append(
            PART_FIELDS.pack(
                flags, layout.number, entry.rows, 0, entry.id, start, entry.nbytes, entry.row_load
            )
        )
        pieces.append(pack(f"<{len(part.row_indices)}I", *part.row_indices))
    return b"".join(pieces)
