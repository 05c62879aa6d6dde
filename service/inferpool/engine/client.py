"""The web process's end of a channel to an engine: entries go out, results come in, crashes are replayed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from struct import pack
from typing import Any, Final, NamedTuple, Protocol

from inferpool.engine.arena import ALIGNMENT, HEADER_BYTES, Arena
from inferpool.engine.channel import CLOSED, NOTHING, Incoming
from inferpool.engine.records import (
    ALONE,
    ASK,
    ASK_FIELDS,
    CANCEL,
    CANCEL_FIELDS,
    ENDED,
    ENDED_FIELDS,
    ERROR,
    ERROR_FIELDS,
    GIVE,
    GIVE_FIELDS,
    HEAD,
    HEAD_BYTES,
    HELLO,
    INLINE,
    INLINE_BYTES,
    LAYOUT,
    LAYOUT_FIELDS,
    MOST_ID,
    MOST_ROWS,
    NEED,
    NEED_FIELDS,
    OFFER,
    OFFER_FIELDS,
    PART_FIELDS,
    REASONS,
    REPLAY,
    REPLY,
    RESULT,
    RESULT_FIELDS,
    RUNS_ON,
    SUSPECT,
    ProtocolError,
    check_hello,
    check_length,
    hello,
    json_record,
    read_error,
    read_json,
)
from inferpool.engine.tensor_layouts import Layout, LayoutTable, encode, read, read_layout, write
from inferpool.errors import DeadlineExceeded, InferpoolError, ModelCrashed, NotReady, Overloaded, QueueFull
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry, Result, VersionKey
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

MOST_ENTRIES: Final = 65_536
"""Entries that may be without their result at a time."""
MOST_QUESTIONS: Final = 256
"""Questions that may be without a reply at a time."""
MOST_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Bytes of records that may wait for an engine that does not read."""
COPIED_BYTES: Final = 64 * 1024
"""Outputs of at most so many bytes are copied, so that their block is free at once."""
_MOST_ID_BYTES: Final = 256
"""Bytes of a request's id that the engine is told, for its log."""
_OUTPUT_SLACK: Final = 1024
"""Bytes for the gaps between outputs, beside what the last ones took."""
MOST_FULL_S: Final = 0.1
"""A queue that was full counts as full no longer than this, unless it refuses another entry."""
REFUSED_S: Final = 2.0
"""How long an entry is offered again to an engine that lacks its version.

What is known of a version that moves between engines comes by way of the supervisor, and may come later.
"""
LOOK_AGAIN_S: Final = 0.05
"""Pause before an entry that was refused is offered again."""
MOST_CRASHES: Final = 2
"""An entry that has run in so many engines when they crashed is not sent again."""


class Loop(Protocol):
    """The methods of an event loop that the client calls; asyncio's and uvloop's have them."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> object:
        """Call `callback` in the next iteration."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> object:
        """Call `callback` after `delay` seconds."""

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> object:
        """Call `callback` whenever `fd` can be read."""

    def remove_reader(self, fd: Any) -> object:
        """Stop what `add_reader` began."""

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> object:
        """Call `callback` whenever `fd` can be written."""

    def remove_writer(self, fd: Any) -> object:
        """Stop what `add_writer` began."""


class Results(Protocol):
    """Takes results on the event loop; `inferpool.http.predict.results.ResultDispatcher` does."""

    def put(self, results: Sequence[Result]) -> None:
        """Deliver results soon, not within this call."""

    def deliver(self, results: Sequence[Result]) -> None:
        """Deliver results now."""


class _Pending:
    """An entry whose block is in use.

    Attributes:
        entry: the entry, without its inputs.
        layout: the layout of its inputs; None if it has parts.
        parts: the layouts of its parts.
        starts: where in the block the inputs of each part begin.
        offset: where the block is in the arena.
        nbytes: for how many bytes the block was allocated.
        outputs_at: where in the block outputs begin.
        more_at: where the memory is that was given for outputs too large for the block.
        more_bytes: how many bytes that memory has; 0 if there is none.
        sent: whether the engine has the entry.
        accepted: whether an engine that ended had the entry.
        crashes: in how many engines the entry ran when they ended.
        wanted: whether the result is still to be delivered.
        refusal: why the engine does not run the version, if it has refused the entry.
        refused_until: when a refusal becomes the result, unless another engine has the version by then.
        runs_on: whether the engine has answered, and still reads the block.
    """

    __slots__ = (
        "accepted", "crashes", "entry", "layout", "more_at", "more_bytes", "nbytes", "offset", "outputs_at",
        "parts", "refusal", "refused_until", "runs_on", "sent", "starts", "wanted",
    )  # fmt: skip

    def __init__(
        self, entry: Entry, layout: Layout | None, offset: int, nbytes: int, outputs_at: int
    ) -> None:
        self.entry = entry
        self.layout = layout
        self.parts: Sequence[Layout] = ()
        self.starts: Sequence[int] = ()
        self.offset = offset
        self.nbytes = nbytes
        self.outputs_at = outputs_at
        self.more_at = 0
        self.more_bytes = 0
        self.sent = False
        self.accepted = False
        self.crashes = 0
        self.wanted = True
        self.refusal: InferpoolError | None = None
        self.refused_until = 0.0
        self.runs_on = False


class Suspects(NamedTuple):
    """The versions that may have ended an engine.

    Attributes:
        running: those with entries that were running.
        confirmed: those with an entry that was running when an earlier engine ended, too, and ran alone here.
    """

    running: list[VersionKey]
    confirmed: list[VersionKey]


class EngineClient:
    """Sends entries to one engine and delivers their results. All calls on the event loop's thread.

    An engine may end, and be followed by another one with a higher epoch. Entries without a result are sent
    to the successor: those that waited as they are, those that ran alone. An entry that was running in two
    engines when they ended gets ModelCrashed. Entries that are offered while there is no engine wait for it.

    Life: `attach` when an engine is ready to run entries, `detach` when it is dead, again and again; `close`
    at the end. `expect` comes first if the engine is being restarted when the web process starts.
    """

    def __init__(
        self,
        results: Results,
        loop: Loop,
        clock: Callable[[], float],
        web: int,
        lost: Callable[[int, str], None],
        refused: Callable[[], None],
        most_entries: int = MOST_ENTRIES,
        metrics: Metrics | None = None,
    ) -> None:
        """`web` is the number of this web process. Results go to `results`. At most `most_entries`
        entries are without their result at a time.

        Entries that are sent again or crash an engine twice are counted in `metrics`.

        `lost` is called with the epoch and a reason if the channel breaks: the engine is dead, or has sent
        what is no record. The client then uses the channel no more, and waits for `detach`.

        `refused` is called if the engine lacks the version of an entry; a call of `reroute` must follow, once
        all that is known about versions has been taken note of.
        """
        self._results = results
        self._loop = loop
        self._clock = clock
        self._web = web
        self._lost = lost
        self._refused = refused
        self._most_entries = most_entries
        self._metrics = metrics
        self._arena: Arena | None = None
        self._arena_id = (0, 0)
        self._socket: socket.socket | None = None
        self._epoch = 0
        self._greeted = False
        self._incoming = Incoming()
        self._outgoing = bytearray()
        self._flush_planned = False
        self._writer_added = False
        self._layouts = LayoutTable()
        self._output_layouts: dict[int, Layout] = {}
        self._pending: dict[int, _Pending] = {}
        # Results whose outputs are views of blocks, until `release`.
        self._held: dict[int, _Pending] = {}
        self._questions: dict[int, Callable[[Any], None]] = {}
        self._last_question = 0
        self._closed = False
        # By version and tenant: the refusal of a queue that was full a moment ago, and until when it holds.
        self._full: dict[tuple[VersionKey, int], tuple[QueueFull, float]] = {}

    # The engine comes and goes.

    @property
    def epoch(self) -> int:
        """The epoch of the engine that entries are sent to; 0 if there is none."""
        return self._epoch if self._socket is not None else 0

    @property
    def is_over(self) -> bool:
        """Whether the client is closed, and nobody reads outputs in its arena."""
        return self._closed and not self._held

    @property
    def unanswered(self) -> int:
        """How many entries have no result yet."""
        return sum(1 for pending in self._pending.values() if pending.wanted)

    def expect(self, arena: int) -> None:
        """Keep entries for an engine that is being started, whose `attach` will follow.

        `arena` is the descriptor of the arena, which the client closes. Raises ValueError if it is another
        one than before.
        """
        try:
            status = os.fstat(arena)
            if self._arena is None:
                self._arena = Arena(arena)
                self._arena_id = (status.st_dev, status.st_ino)
            elif self._arena_id != (status.st_dev, status.st_ino):
                raise ValueError("the successor of an engine came with another arena")
        finally:
            os.close(arena)

    def attach(self, epoch: int, channel: socket.socket, arena: int) -> None:
        """Send entries to the engine at the other end of `channel` from now on, first those without a result.

        Call this when the engine can run the versions, because it refuses entries of others. `arena` is the
        descriptor of the arena, always the same one. The client closes `channel` and `arena`.

        Raises ValueError if an engine is attached, the epoch is not new, or the arena is another one.
        """
        try:
            self.expect(arena)
            if self._socket is not None:
                raise ValueError(f"the engine of epoch {self._epoch} is still attached")
            if epoch <= self._epoch:
                raise ValueError(f"an engine of epoch {epoch} after one of epoch {self._epoch}")
            assert self._arena is not None  # as expected
        except BaseException:
            channel.close()
            raise
        channel.setblocking(False)
        self._epoch = epoch
        self._socket = channel
        self._greeted = False
        self._incoming = Incoming()
        self._output_layouts = {}
        self._outgoing = bytearray(hello(self._web, epoch, self._arena.size))
        self._loop.add_reader(channel.fileno(), self._readable)
        for pending in list(self._pending.values()):
            if pending.wanted:
                pending.refusal = None
                self._arena.memory[pending.offset] = 0
                self._send_offer(pending)
        self._plan_flush()

    def detach(self, epoch: int, *, blame: bool = True) -> Suspects:
        """Take note that the engine of `epoch` is dead: it uses the arena no more.

        Running entries are suspects: they will run alone. Returns their versions.
        Unless `blame`, something else is known to have ended the engine.
        """
        if epoch != self._epoch:
            return Suspects([], [])
        self._disconnect()
        arena = self._arena
        if arena is None:
            return Suspects([], [])
        versions: dict[VersionKey, None] = {}
        confirmed: dict[VersionKey, None] = {}
        crashed: list[Result] = []
        for entry_id, pending in list(self._pending.items()):
            if pending.more_bytes:
                arena.free(pending.more_at, pending.more_bytes)
                pending.more_bytes = 0
            ran = pending.sent and arena.memory[pending.offset] != 0
            pending.accepted = pending.accepted or pending.sent
            pending.sent = False
            if ran and not pending.runs_on:
                versions[pending.entry.key] = None
                if blame:
                    pending.crashes += 1
                    if pending.crashes >= MOST_CRASHES:
                        confirmed[pending.entry.key] = None
            if not pending.wanted:
                self._free(entry_id, pending)
            elif pending.crashes >= MOST_CRASHES:
                _log_crash(pending)
                self._count("crashed_entries_total", pending)
                error = ModelCrashed("the model's process ended on this request, twice")
                crashed.append(self._local_result(pending, error))
                self._free(entry_id, pending)
        if crashed:
            self._results.put(crashed)
        self._full.clear()
        return Suspects(list(versions), list(confirmed))

    def give_up(self, error: Callable[[], InferpoolError]) -> None:
        """Answer every entry with an error, because no engine will come. None may be attached."""
        if self._socket is not None or any(pending.sent for pending in self._pending.values()):
            raise ValueError(f"the engine of epoch {self._epoch} is still attached")
        results: list[Result] = []
        for entry_id, pending in list(self._pending.items()):
            if pending.wanted:
                results.append(self._local_result(pending, error()))
            self._free(entry_id, pending)
        if results:
            self._results.put(results)

    def reroute(self, clients: Mapping[VersionKey, EngineClient]) -> None:
        """Take note of which client has which version now.

        A version may move to another engine while this one is replaced. Entries that this engine does not
        have move with their version. An entry that an engine has refused because it lacks the version is sent
        to the version's engine, or gets the refusal if there is none.
        """
        results: list[Result] = []
        for entry_id, pending in list(self._pending.items()):
            if pending.sent or not pending.wanted:
                continue
            target = clients.get(pending.entry.key)
            if target is self:
                if pending.refusal is not None and self._socket is not None:
                    self._send_offer(pending)  # it may be refused again
                    self._plan_flush()
                continue
            if target is not None:
                if target._arena is None:
                    continue  # it has no engine yet
                try:
                    self._restore_inputs(pending)
                    target.offer(pending.entry, pending.accepted, pending.crashes)
                except InferpoolError as error:
                    results.append(self._local_result(pending, error))
            elif pending.refusal is not None:
                results.append(self._local_result(pending, pending.refusal))
            else:
                continue
            self._free(entry_id, pending)
        if results:
            self._results.put(results)

    def _restore_inputs(self, pending: _Pending) -> None:
        arena = self._arena
        assert arena is not None  # it has the block
        begin = pending.offset + HEADER_BYTES
        end = pending.offset + pending.outputs_at
        entry = pending.entry
        if pending.layout is not None:
            entry.inputs = _copied(read(arena.map, begin, end, pending.layout, entry.rows))
        for part, layout, start in zip(entry.parts, pending.parts, pending.starts, strict=True):
            own = part.entry
            own.inputs = _copied(read(arena.map, pending.offset + start, end, layout, own.rows))

    def close(self) -> None:
        """Close the channel. Entries without a result get none."""
        self._disconnect()
        self._closed = True

    def _count(self, name: str, pending: _Pending) -> None:
        """Add 1 to a counter of the entry's version."""
        if self._metrics is not None:
            key = pending.entry.key
            self._metrics.value(name, key.model, str(key.version)).add(1.0)

    # The inbox.

    def offer(self, entry: Entry, accepted: bool = False, crashes: int = 0) -> None:
        """Send `entry`, whose inputs are copied and then dropped; raises Overloaded or NotReady.

        `accepted` says that another engine had accepted the entry, and `crashes` how many ended with it.
        """
        arena = self._arena
        if arena is None:
            raise NotReady("the engine is starting; try again later")
        if len(self._pending) >= self._most_entries:
            raise Overloaded(f"{self._most_entries} requests wait for the engine, the limit; try again later")
        if len(self._outgoing) > MOST_WAITING_BYTES:
            raise Overloaded("the engine does not keep up; try again later")
        if not 0 < entry.id < MOST_ID:
            raise ValueError(f"an entry has the id {entry.id}")
        if entry.parts:
            self._offer_parts(arena, entry, accepted, crashes)
            return
        group: Hashable = None if entry.group == entry.id else entry.group
        layout = self._layouts.find(entry.key, entry.inputs, entry.rows, group, entry.outputs)
        body = b""
        if layout.plain:
            size = layout.size(entry.rows)
        else:
            body = encode(layout, entry.inputs)
            size = len(body)
        outputs_at = (HEADER_BYTES + size + (ALIGNMENT - 1)) & -ALIGNMENT
        nbytes = outputs_at
        if layout.row_bytes:
            outputs = layout.row_bytes * (entry.rows or 1)
            if outputs > INLINE_BYTES:
                nbytes += outputs + _OUTPUT_SLACK
        offset = arena.allocate(nbytes)
        at = offset + HEADER_BYTES
        if layout.plain:
            write(arena.map, at, layout, entry.inputs, entry.rows)
        else:
            arena.map[at : at + size] = body
        arena.memory[offset] = 0
        entry.inputs = {}
        pending = _Pending(entry, layout, offset, nbytes, outputs_at)
        if accepted:
            pending.accepted = True
            pending.crashes = crashes
        self._pending[entry.id] = pending
        if self._socket is not None:
            self._send_offer(pending)
            if not self._flush_planned:
                self._plan_flush()

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise Overloaded, NotReady or QueueFull if no entry could be accepted now.

        A queue that has refused an entry counts as full until an entry of its version ends, or until the
        excess should have run. This is a guess in any case: the entry is offered later.
        """
        if self._arena is None:
            raise NotReady("the engine is starting; try again later")
        if len(self._pending) >= self._most_entries or len(self._outgoing) > MOST_WAITING_BYTES:
            raise Overloaded("the engine does not keep up; try again later")
        if self._full and (key, tenant) in self._full:
            full, until = self._full[key, tenant]
            if self._clock() < until:
                raise QueueFull(full.detail, full.retry_after_s)
            del self._full[key, tenant]

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry. With the reason `deadline` it gets DeadlineExceeded, after the call returns."""
        pending = self._pending.get(entry_id)
        if pending is None or not pending.wanted:
            return
        pending.wanted = False
        if reason == "deadline":
            arena = self._arena
            ran = pending.sent and arena is not None and arena.memory[pending.offset] != 0
            error = DeadlineExceeded(
                "the deadline passed while the model ran" if ran else
                "the deadline passed before the model could run"
            )  # fmt: skip
            self._results.put([self._local_result(pending, error)])
        if pending.sent:
            number = REASONS.index(reason)
            self._outgoing += CANCEL_FIELDS.pack(CANCEL_FIELDS.size, CANCEL, number, entry_id)
            self._plan_flush()
        else:
            self._free(entry_id, pending)

    def refuse_all(self, error: Callable[[], InferpoolError]) -> None:
        """Answer every entry with an error now, and let the engine stop its runs."""
        for entry_id, pending in list(self._pending.items()):
            if pending.wanted:
                self._results.put([self._local_result(pending, error())])
                self.cancel(pending.entry.key, entry_id, "disconnected")

    def release(self, key: VersionKey, entry_id: int) -> None:
        """Take note that nobody reads the outputs of the entry any more. Does nothing if none are held."""
        pending = self._held.pop(entry_id, None)
        if pending is not None:
            self._free_memory(pending)

    # Questions.

    def ask(self, message: object, then: Callable[[Any], None]) -> None:
        """Ask the engine something: `message` is a JSON value. `then` gets the reply, or None.

        The reply is None if no engine is attached, or the engine ends before it replies. Raises Overloaded if
        too many questions are without a reply.
        """
        if self._socket is None:
            self._loop.call_soon(then, None)
            return
        if len(self._questions) >= MOST_QUESTIONS or len(self._outgoing) > MOST_WAITING_BYTES:
            raise Overloaded("the engine does not answer; try again later")
        self._last_question = self._last_question % 0xFFFFFFFF + 1
        self._outgoing += json_record(ASK_FIELDS, ASK, self._last_question, message)
        self._questions[self._last_question] = then
        self._plan_flush()

    # What goes out.

    def flush(self) -> None:
        """Write what was offered since the last call. The loop calls this soon after an offer in any case."""
        self._flush_planned = False
        channel = self._socket
        if channel is None or self._writer_added or not self._outgoing:
            return
        try:
            count = channel.send(self._outgoing)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            self._break(f"the engine closed the channel: {error}")
            return
        if count == len(self._outgoing):
            self._outgoing.clear()
        else:
            del self._outgoing[:count]
            self._writer_added = True
            self._loop.add_writer(channel.fileno(), self._writable)

    def _plan_flush(self) -> None:
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self.flush)

    def _writable(self) -> None:
        channel = self._socket
        if channel is not None and self._writer_added:
            self._loop.remove_writer(channel.fileno())
            self._writer_added = False
            self.flush()

    def _send_layout(self, layout: Layout) -> None:
        if layout.number < 0:
            self._layouts.renumber(layout)
        if layout.sent != self._epoch:
            self._outgoing += layout.record()
            layout.sent = self._epoch

    def _send_offer(self, pending: _Pending) -> None:
        entry = pending.entry
        layout = pending.layout
        flags = 0
        number = 0
        if layout is not None:
            if layout.sent != self._epoch or layout.number < 0:
                self._send_layout(layout)
            number = layout.number
            if entry.group == entry.id:
                flags = ALONE
        if pending.accepted:
            self._count("replayed_entries_total", pending)
            flags |= REPLAY | SUSPECT if pending.crashes else REPLAY
        request_id = entry.request_id.encode()
        if len(request_id) > _MOST_ID_BYTES:
            request_id = request_id[:_MOST_ID_BYTES]
        tail = request_id
        if pending.parts:
            for each in pending.parts:
                self._send_layout(each)
            tail = request_id + self._part_records(pending)
        length = OFFER_FIELDS.size + len(tail)
        check_length(length)
        self._outgoing += OFFER_FIELDS.pack(
            length, OFFER, flags, len(request_id), min(entry.priority, 0x7FFFFFFF), number, entry.rows,
            len(pending.parts), entry.id, pending.offset, pending.nbytes, pending.outputs_at, entry.nbytes,
            entry.arrived, entry.deadline, entry.row_load, entry.tenant, entry.share,
            min(entry.rank, 0x7FFFFFFF),
        )  # fmt: skip
        if tail:
            self._outgoing += tail
        pending.sent = True

    def _part_records(self, pending: _Pending) -> bytes:
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

    def _offer_parts(self, arena: Arena, entry: Entry, accepted: bool, crashes: int) -> None:
        layouts: list[Layout] = []
        bodies: list[bytes] = []
        starts: list[int] = []
        at = HEADER_BYTES
        for part in entry.parts:
            own = part.entry
            if not 0 < own.id < MOST_ID:
                raise ValueError(f"a part of an entry has the id {own.id}")
            group: Hashable = None if own.group == own.id else own.group
            layout = self._layouts.find(own.key, own.inputs, own.rows, group, own.outputs)
            body = encode(layout, own.inputs)
            layouts.append(layout)
            bodies.append(body)
            starts.append(at)
            at = (at + len(body) + (ALIGNMENT - 1)) & -ALIGNMENT
        offset = arena.allocate(at)
        for start, body in zip(starts, bodies, strict=True):
            arena.map[offset + start : offset + start + len(body)] = body
        arena.memory[offset] = 0
        for part in entry.parts:
            part.entry.inputs = {}
        pending = _Pending(entry, None, offset, at, at)
        pending.parts = layouts
        pending.starts = starts
        pending.accepted = accepted
        pending.crashes = crashes
        self._pending[entry.id] = pending
        if self._socket is not None:
            self._send_offer(pending)
            self._plan_flush()

    # What comes in.

    def _readable(self) -> None:
        channel = self._socket
        if channel is None:
            return
        count = self._incoming.receive(channel)
        if count == NOTHING:
            return
        if count == CLOSED:
            self._break("the engine closed the channel")
            return
        results: list[Result] = []
        broken: str | None = None
        try:
            self._read_records(results)
        except ProtocolError as wrong:
            broken = str(wrong)
        except Exception:
            log.exception("the records of an engine could not be read")
            broken = "the records of the engine could not be read"
        if results:
            self._results.deliver(results)
        if broken is not None:
            log.error("the engine broke the protocol of its channel, which is closed: %s", broken)
            self._break(broken)
        elif self._outgoing and not self._flush_planned:
            self.flush()

    def _read_records(self, results: list[Result]) -> None:
        incoming = self._incoming
        buffer = incoming.buffer
        at = incoming.start
        stop = incoming.stop
        length = 0
        while stop - at >= HEAD_BYTES:
            length, kind = HEAD.unpack_from(buffer, at)
            check_length(length)
            if stop - at < length:
                break
            if kind == RESULT and self._greeted:
                self._read_result(buffer, at, length, results)
            else:
                self._read_other(kind, bytes(buffer[at : at + length]), results)
            at += length
            length = 0
        if at == stop:
            incoming.start = incoming.stop = 0
        else:
            incoming.start = at
            incoming.make_room(length)

    def _read_result(self, buffer: bytearray, at: int, length: int, results: list[Result]) -> None:
        if length < RESULT_FIELDS.size:
            raise ProtocolError(f"a result of {length} bytes came")
        _, _, flags, number, rows, entry_id, queue_s, compute_s, batch_rows, offset, size = (
            RESULT_FIELDS.unpack_from(buffer, at)
        )
        pending = self._pending.get(entry_id)
        if pending is None or not pending.sent or pending.runs_on:
            raise ProtocolError(f"a result of entry {entry_id} came, which the engine does not have")
        layout = self._output_layouts.get(number)
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
            self._check_outputs(pending, offset, size)
            arena = self._arena
            assert arena is not None  # the engine is attached
            if size <= COPIED_BYTES or flags & RUNS_ON:
                outputs = read(bytearray(arena.map[offset : offset + size]), 0, size, layout, rows)
            else:
                outputs = read(arena.map, offset, offset + size, layout, rows)
                held = True
        if pending.wanted:
            results.append(Result(entry_id, outputs, None, queue_s, compute_s, batch_rows))
        if self._full:
            self._full.pop((pending.entry.key, pending.entry.tenant), None)
        if flags & RUNS_ON:
            pending.wanted = False
            pending.runs_on = True
        elif held and pending.wanted:
            del self._pending[entry_id]
            self._held[entry_id] = pending
        else:
            self._free(entry_id, pending)

    def _check_outputs(self, pending: _Pending, offset: int, size: int) -> None:
        """Raise ProtocolError unless the outputs are in memory that the entry has for them."""
        begin = pending.offset + pending.outputs_at
        if begin <= offset and offset + size <= pending.offset + pending.nbytes:
            return
        if pending.more_at <= offset and offset + size <= pending.more_at + pending.more_bytes:
            return
        raise ProtocolError(f"outputs at {offset} of {size} bytes came, which is not the entry's memory")

    def _read_other(self, kind: int, record: bytes, results: list[Result]) -> None:
        if not self._greeted:
            if kind != HELLO:
                raise ProtocolError(f"a record of kind {kind} came before the greeting")
            arena = self._arena
            assert arena is not None  # the engine is attached
            check_hello(record, self._web, self._epoch, arena.size)
            self._greeted = True
        elif kind == LAYOUT:
            _, _, number = _unpack(LAYOUT_FIELDS, record, more=True)
            layout = read_layout(record[LAYOUT_FIELDS.size :])
            if number >= 1 << 16:
                raise ProtocolError(f"a layout with the number {number} came")
            self._output_layouts[number] = layout
        elif kind == ERROR:
            self._read_error(record, results)
        elif kind == NEED:
            _, _, entry_id, size = _unpack(NEED_FIELDS, record)
            self._give(entry_id, size)
        elif kind == ENDED:
            _, _, entry_id = _unpack(ENDED_FIELDS, record)
            pending = self._pending.get(entry_id)
            if pending is None or not pending.runs_on:
                raise ProtocolError(f"the run of entry {entry_id} ended, which did not run on")
            self._free(entry_id, pending)
        elif kind == REPLY:
            _, _, number = _unpack(ASK_FIELDS, record, more=True)
            then = self._questions.pop(number, None)
            if then is None:
                raise ProtocolError(f"a reply to question {number} came, which was not asked")
            self._loop.call_soon(then, read_json(record[ASK_FIELDS.size :]))
        else:
            raise ProtocolError(f"a record of kind {kind} came from an engine")

    def _read_error(self, record: bytes, results: list[Result]) -> None:
        _, _, flags, entry_id, queue_s, compute_s, batch_rows = _unpack(ERROR_FIELDS, record, more=True)
        pending = self._pending.get(entry_id)
        if pending is None or not pending.sent or pending.runs_on:
            raise ProtocolError(f"an error of entry {entry_id} came, which the engine does not have")
        error = read_error(record[ERROR_FIELDS.size :])
        if pending.wanted and isinstance(error, NotReady) and not flags & RUNS_ON:
            # The version may have moved to another engine, or be about to: `reroute` tells.
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
            full_s = min(error.retry_after_s, MOST_FULL_S)
            self._full[pending.entry.key, pending.entry.tenant] = (error, self._clock() + full_s)
        elif self._full:
            self._full.pop((pending.entry.key, pending.entry.tenant), None)
        if pending.wanted:
            results.append(Result(entry_id, None, error, queue_s, compute_s, batch_rows))
        if flags & RUNS_ON:
            pending.wanted = False
            pending.runs_on = True
        else:
            self._free(entry_id, pending)

    def _give(self, entry_id: int, size: int) -> None:
        """Allocate memory for outputs, or refuse: if there is none, or nobody waits for the outputs."""
        pending = self._pending.get(entry_id)
        arena = self._arena
        if pending is None or not pending.sent or pending.more_bytes or arena is None or not size:
            raise ProtocolError(f"memory for outputs of entry {entry_id} was asked for out of turn")
        if pending.wanted:
            try:
                if size <= arena.size:
                    pending.more_at = arena.allocate(size)
                    pending.more_bytes = size
            except Overloaded:
                pass  # the engine answers the entry with this error
        fields = (GIVE_FIELDS.size, GIVE, entry_id, pending.more_at, pending.more_bytes)
        self._outgoing += GIVE_FIELDS.pack(*fields)

    # Ends.

    def _local_result(self, pending: _Pending, error: InferpoolError) -> Result:
        return Result(pending.entry.id, None, error, max(0.0, self._clock() - pending.entry.arrived))

    def _free(self, entry_id: int, pending: _Pending) -> None:
        del self._pending[entry_id]
        self._free_memory(pending)

    def _free_memory(self, pending: _Pending) -> None:
        arena = self._arena
        assert arena is not None  # it has the block
        arena.free(pending.offset, pending.nbytes)
        if pending.more_bytes:
            arena.free(pending.more_at, pending.more_bytes)
            pending.more_bytes = 0

    def _break(self, reason: str) -> None:
        """Use the channel no more. The blocks stay as they are until the engine is known to be dead."""
        epoch = self._epoch
        self._disconnect()
        self._lost(epoch, reason)

    def _disconnect(self) -> None:
        channel = self._socket
        if channel is None:
            return
        self._socket = None
        self._loop.remove_reader(channel.fileno())
        if self._writer_added:
            self._loop.remove_writer(channel.fileno())
            self._writer_added = False
        channel.close()
        self._outgoing = bytearray()
        questions = list(self._questions.values())
        self._questions.clear()
        for then in questions:
            self._loop.call_soon(then, None)


def _unpack(fields: Any, record: bytes, *, more: bool = False) -> tuple[Any, ...]:
    """Return the fields of a record; raises ProtocolError if it is too short, or too long unless `more`."""
    if len(record) < fields.size or (len(record) > fields.size and not more):
        raise ProtocolError(f"a record of {len(record)} bytes came, expected {fields.size}")
    found: tuple[Any, ...] = fields.unpack_from(record)
    return found


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.copy() for name, tensor in tensors.items()}


def _log_crash(pending: _Pending) -> None:
    entry = pending.entry
    layouts = pending.parts if pending.layout is None else [pending.layout]
    shapes = "; ".join(
        f"{form.name:.100} {form.code} {['rows', *form.shape] if form.by_rows else list(form.shape)}"
        for layout in layouts[:4]
        for form in layout.forms[:8]
    )
    log.error(
        "%s/%d crashed its engine on request %s twice: %d rows of %s",
        entry.key.model, entry.key.version, entry.request_id, entry.rows, shapes,
    )  # fmt: skip
