"""Reads what one web process sends to an engine: offers become entries, whose inputs stay in the arena."""

from __future__ import annotations

import logging
import math
from typing import Final

from inferpool.engine.arena import ALIGNMENT, HEADER_BYTES
from inferpool.engine.channel import RecordReader
from inferpool.engine.records import (
    ALONE,
    ASK,
    ASK_FIELDS,
    CANCEL,
    CANCEL_FIELDS,
    GIVE,
    GIVE_FIELDS,
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
    REPLY,
    ProtocolError,
    check_hello,
    json_record,
    read_json,
)  # fmt: skip
from inferpool.engine.tensor_bytes import read
from inferpool.engine.tensor_layouts import MOST_LAYOUTS, Layout, read_layout
from inferpool.engine.web_connection import Offered, WebConnection
from inferpool.errors import Overloaded
from inferpool.pool.ports import Entry, Part
from inferpool.tensors import Array, Tensors

log = logging.getLogger(__name__)

ID_BITS: Final = 40
"""An entry's id here is its id in the web process, with the number of the connection before these bits."""
_MOST_PARTS: Final = 1 << 20
_MOST_BLOCKS: Final = 2048
"""Blocks whose arrays are kept, each of about 300 bytes."""


class BlockInputs:
    """The only input of an entry in a block, an array that views the arena.

    The web process uses a block again and again, mostly for inputs of the same layout. Making an array of the
    memory costs more than reading all other fields of an offer.
    """

    __slots__ = ("layout", "rows", "tensor")

    def __init__(self, layout: Layout, rows: int, tensor: Array) -> None:
        self.layout = layout
        self.rows = rows
        self.tensor = tensor


class EntryTaker:
    """Takes what readers read: `EnginePort` does. It is a class so that compiled calls are quick."""

    def has(self, entry_id: int) -> bool:
        """Whether an entry has come that has not ended."""
        raise NotImplementedError

    def take(self, entry_id: int, offered: Offered) -> None:
        """Take an entry."""
        raise NotImplementedError

    def cancel(self, entry_id: int, reason: str) -> None:
        """Drop an entry for which nobody waits any more, unless it has ended."""
        raise NotImplementedError

    def answer(self, question: object) -> object:
        """The reply to a question of a web process; None if there is none."""
        raise NotImplementedError


class OfferReader(RecordReader):
    """What one web process sends.

    Attributes:
        connection: the connection to the web process.
    """

    __slots__ = ("_greeted", "_inputs", "_layouts", "_taker", "connection")

    def __init__(self, connection: WebConnection, taker: EntryTaker) -> None:
        super().__init__()
        self.connection = connection
        self._taker = taker
        self._greeted = False
        self._layouts: dict[int, Layout] = {}
        self._inputs: dict[int, BlockInputs] = {}

    def take_record(self, kind: int, at: int, length: int) -> None:
        """Take a record, as `RecordReader` says."""
        if kind == OFFER and self._greeted:
            self._read_offer(at, length)
        else:
            self._read_other(kind, bytes(self.incoming.buffer[at : at + length]))

    def _read_offer(self, at: int, length: int) -> None:
        connection = self.connection
        buffer = self.incoming.buffer
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
        entry_id = connection.serial << ID_BITS | web_id
        if self._taker.has(entry_id):
            raise ProtocolError(f"entry {web_id} came again, before its end")
        request_id = buffer[at : at + id_bytes].decode("utf-8", "replace") if id_bytes else ""
        at += id_bytes
        if parts:
            entry = self._entry_of_parts(
                bytes(buffer[at:end]), parts, entry_id, (offset, outputs_at), input_bytes,
                (arrived, deadline), priority, row_load, request_id,
            )  # fmt: skip
            for part in entry.parts:
                _mark(part.entry, tenant, share, rank)
            if entry.rows != rows:
                raise ProtocolError(f"entry {web_id} has {rows} rows, and parts of {entry.rows} rows")
        else:
            layout = self._layouts.get(number)
            if layout is None or at != end:
                raise ProtocolError(f"an offer of entry {web_id} with an unknown layout came")
            # Objects of the entry's own are made in one call each: this runs for every request.
            entry = Entry(
                entry_id,
                layout.key,
                self._read_inputs(layout, rows, offset, outputs_at),
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
        self._taker.take(entry_id, offered)

    def _read_inputs(self, layout: Layout, rows: int, offset: int, outputs_at: int) -> Tensors:
        """Return the inputs in the block at `offset`, which end before `outputs_at` in it."""
        single = layout.single
        if single is None:
            return read(self.connection.arena.map, offset + HEADER_BYTES, offset + outputs_at, layout, rows)
        known = self._inputs.get(offset)
        if (
            known is not None
            and known.layout is layout
            and known.rows == rows
            and HEADER_BYTES + single.nbytes * rows <= outputs_at
        ):
            return {single.name: known.tensor}
        inputs = read(self.connection.arena.map, offset + HEADER_BYTES, offset + outputs_at, layout, rows)
        if len(self._inputs) >= _MOST_BLOCKS:
            self._inputs.clear()
        self._inputs[offset] = BlockInputs(layout, rows, inputs[single.name])
        return inputs

    def _entry_of_parts(
        self,
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
        connection = self.connection
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
            layout = self._layouts.get(number)
            part_id = connection.serial << ID_BITS | web_id
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

    def _read_other(self, kind: int, record: bytes) -> None:
        connection = self.connection
        if not self._greeted:
            if kind != HELLO:
                raise ProtocolError(f"a record of kind {kind} came before the greeting")
            check_hello(record, connection.web, connection.epoch, connection.arena.size)
            self._greeted = True
        elif kind == LAYOUT:
            if len(record) < LAYOUT_FIELDS.size:
                raise ProtocolError("a layout without a number came")
            _, _, number = LAYOUT_FIELDS.unpack_from(record)
            if number >= MOST_LAYOUTS:
                raise ProtocolError(f"a layout with the number {number} came")
            self._layouts[number] = read_layout(record[LAYOUT_FIELDS.size :])
        elif kind == CANCEL:
            self._cancel(record)
        elif kind == GIVE:
            self._take_memory(record)
        elif kind == ASK:
            if len(record) < ASK_FIELDS.size:
                raise ProtocolError("a question without a number came")
            _, _, number = ASK_FIELDS.unpack_from(record)
            question = read_json(record[ASK_FIELDS.size :])
            answer: object = None
            try:
                answer = self._taker.answer(question)
            except Exception:
                log.exception("a question of web process %d could not be answered", connection.web)
            with connection.lock:
                connection.outgoing += json_record(ASK_FIELDS, REPLY, number, answer)
        else:
            raise ProtocolError(f"a record of kind {kind} came from a web process")

    def _cancel(self, record: bytes) -> None:
        if len(record) != CANCEL_FIELDS.size:
            raise ProtocolError(f"a record of {len(record)} bytes came, expected {CANCEL_FIELDS.size}")
        _, _, number, web_id = CANCEL_FIELDS.unpack(record)
        if number >= len(REASONS):
            raise ProtocolError(f"a cancellation for the reason {number} came")
        self._taker.cancel(self.connection.serial << ID_BITS | web_id, REASONS[number])

    def _take_memory(self, record: bytes) -> None:
        """Write the outputs of an entry into the memory that the web process gives."""
        if len(record) != GIVE_FIELDS.size:
            raise ProtocolError(f"a record of {len(record)} bytes came, expected {GIVE_FIELDS.size}")
        _, _, web_id, offset, nbytes = GIVE_FIELDS.unpack(record)
        connection = self.connection
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
