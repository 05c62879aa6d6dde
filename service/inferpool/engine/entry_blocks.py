"""The blocks of entries in the arena that a web process shares with an engine and its successors.

The web process owns every block. A block is in use until the result of its entry has come, no run reads it,
and, if outputs stay in it, their response is written.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Final

from inferpool.engine.arena import ALIGNMENT, HEADER_BYTES, Arena
from inferpool.engine.event_loop import Loop
from inferpool.engine.lent_bodies import LEAST_LENT_BYTES, LentBodies
from inferpool.engine.pending_entry import PendingEntry
from inferpool.engine.records import INLINE_BYTES, MOST_ID, ProtocolError
from inferpool.engine.tensor_bytes import encode, read, write
from inferpool.engine.tensor_layouts import Layout, LayoutTable
from inferpool.errors import Overloaded
from inferpool.pool.ports import Entry
from inferpool.tensors import Tensors

_OUTPUT_SLACK: Final = 1024
"""Bytes for the gaps between outputs, beside what the last ones took."""


class EntryBlocks:
    """The arena, and the entries that have blocks in it.

    Attributes:
        arena: the arena; None until its descriptor has come.
        pending: the entries without a result, or with a run that still reads the block, by id.
        held: the entries whose outputs are read in their blocks, by id.
        rows: the rows of all entries in `pending`.
    """

    __slots__ = ("_identity", "_lent", "_loop", "arena", "held", "pending", "rows")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.arena: Arena | None = None
        self.pending: dict[int, PendingEntry] = {}
        self.held: dict[int, PendingEntry] = {}
        self.rows = 0
        self._identity = (0, 0)
        self._lent: LentBodies | None = None

    def map(self, descriptor: int) -> None:
        """Map the arena of `descriptor`, which is closed; raises ValueError if the arena is another one."""
        try:
            status = os.fstat(descriptor)
            if self.arena is None:
                self.arena = Arena(descriptor, self._loop)
                self._identity = (status.st_dev, status.st_ino)
            elif self._identity != (status.st_dev, status.st_ino):
                raise ValueError("the successor of an engine came with another arena")
        finally:
            os.close(descriptor)

    # Blocks of entries.

    def put_inputs(self, entry: Entry, layout: Layout) -> PendingEntry:
        """Put the inputs of an entry into a block, and drop them; raises Overloaded if there is no room."""
        arena = self.arena
        assert arena is not None  # the caller has looked
        if layout.plain and self._lent is not None and entry.nbytes >= LEAST_LENT_BYTES:
            received = self._take_body(self._lent, entry, layout)
            if received is not None:
                return received
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
        return self._add(entry, PendingEntry(entry, layout, offset, nbytes, outputs_at))

    def put_parts(self, entry: Entry, table: LayoutTable) -> PendingEntry:
        """Put the inputs of the parts of an entry into a block; raises Overloaded if there is no room."""
        arena = self.arena
        assert arena is not None  # the caller has looked
        layouts: list[Layout] = []
        bodies: list[bytes] = []
        starts: list[int] = []
        at = HEADER_BYTES
        for part in entry.parts:
            own = part.entry
            if not 0 < own.id < MOST_ID:
                raise ValueError(f"a part of an entry has the id {own.id}")
            group: Hashable = None if own.group == own.id else own.group
            layout = table.find(own.key, own.inputs, own.rows, group, own.outputs)
            body = encode(layout, own.inputs)
            layouts.append(layout)
            bodies.append(body)
            starts.append(at)
            at = (at + len(body) + (ALIGNMENT - 1)) & -ALIGNMENT
        offset = arena.allocate(at)
        for start, body in zip(starts, bodies, strict=True):
            arena.map[offset + start : offset + start + len(body)] = body
        for part in entry.parts:
            part.entry.inputs = {}
        pending = PendingEntry(entry, None, offset, at, at)
        pending.parts = layouts
        pending.starts = starts
        return self._add(entry, pending)

    def restore_inputs(self, pending: PendingEntry) -> None:
        """Give an entry copies of the inputs that its block has."""
        arena = self.arena
        assert arena is not None  # it has the block
        begin = pending.offset + HEADER_BYTES
        end = pending.offset + pending.outputs_at
        entry = pending.entry
        if pending.layout is not None:
            entry.inputs = _copied(read(arena.map, begin, end, pending.layout, entry.rows))
        starts: Sequence[int] = pending.starts
        for part, layout, start in zip(entry.parts, pending.parts, starts, strict=True):
            own = part.entry
            own.inputs = _copied(read(arena.map, pending.offset + start, end, layout, own.rows))

    def has_run(self, pending: PendingEntry) -> bool:
        """Whether the engine that has the entry has begun to run it."""
        arena = self.arena
        return pending.sent and arena is not None and arena.memory[pending.offset] != 0

    def mark_waiting(self, pending: PendingEntry) -> None:
        """Note in the block that the entry does not run: another engine gets the entry."""
        arena = self.arena
        assert arena is not None  # it has the block
        arena.memory[pending.offset] = 0

    def free(self, entry_id: int, pending: PendingEntry) -> None:
        """Free the block of an entry that has ended."""
        del self.pending[entry_id]
        self.rows -= pending.entry.rows
        self._free_memory(pending)

    def hold(self, entry_id: int, pending: PendingEntry) -> None:
        """Keep the block of an entry that has its result: the outputs are read there until `release`."""
        del self.pending[entry_id]
        self.rows -= pending.entry.rows
        self.held[entry_id] = pending

    def release(self, entry_id: int) -> None:
        """Take note that nobody reads the outputs of the entry any more. Does nothing if none are held."""
        pending = self.held.pop(entry_id, None)
        if pending is not None:
            self._free_memory(pending)

    # Memory for outputs that are too large for their block.

    def give(self, entry_id: int, size: int) -> PendingEntry:
        """Allocate `size` bytes for the outputs of an entry, which is returned.

        Without room, or if nobody waits for the outputs, the entry gets none, and the engine answers it with
        an error. Raises ProtocolError if the engine may not ask.
        """
        pending = self.pending.get(entry_id)
        arena = self.arena
        if pending is None or not pending.sent or pending.more_bytes or arena is None or not size:
            raise ProtocolError(f"memory for outputs of entry {entry_id} was asked for out of turn")
        if pending.wanted:
            try:
                if size <= arena.size:
                    pending.more_at = arena.allocate(size)
                    pending.more_bytes = size
            except Overloaded:
                pass
        return pending

    def take_back(self, pending: PendingEntry) -> None:
        """Free the memory that was given for outputs: the engine that asked for it is dead."""
        arena = self.arena
        if pending.more_bytes and arena is not None:
            arena.free(pending.more_at, pending.more_bytes)
            pending.more_bytes = 0

    def check_outputs(self, pending: PendingEntry, offset: int, size: int) -> None:
        """Raise ProtocolError unless the outputs are in memory that the entry has for them."""
        begin = pending.offset + pending.outputs_at
        if begin <= offset and offset + size <= pending.offset + pending.nbytes:
            return
        if pending.more_at <= offset and offset + size <= pending.more_at + pending.more_bytes:
            return
        raise ProtocolError(f"outputs at {offset} of {size} bytes came, which is not the entry's memory")

    # Bodies that are received in the arena.

    def lend(self, nbytes: int, tensors_at: int) -> memoryview | None:
        """Return memory of the arena for a body; None if the body is to be received elsewhere.

        See `LentBodies.lend`.
        """
        if nbytes < LEAST_LENT_BYTES or self.arena is None:
            return None
        if self._lent is None:
            self._lent = LentBodies(self.arena, self._loop)
        return self._lent.lend(nbytes, tensors_at)

    def has_lent(self, entry: Entry) -> bool:
        """Whether the inputs of an entry lie in memory that `lend` has returned."""
        lent = self._lent
        return lent is not None and any(lent.has(tensor) for tensor in entry.inputs.values())

    def _take_body(self, lent: LentBodies, entry: Entry, layout: Layout) -> PendingEntry | None:
        """Make the memory of a body the block of its entry, if the inputs lie there as they have to."""
        taken = lent.take(layout, entry.inputs, entry.rows)
        if taken is None:
            return None
        body, offset, nbytes = taken
        outputs_at = (HEADER_BYTES + layout.size(entry.rows) + (ALIGNMENT - 1)) & -ALIGNMENT
        pending = PendingEntry(entry, layout, offset, nbytes, outputs_at)
        pending.body = body
        return self._add(entry, pending)

    def _add(self, entry: Entry, pending: PendingEntry) -> PendingEntry:
        self.mark_waiting(pending)
        entry.inputs = {}
        self.pending[entry.id] = pending
        self.rows += entry.rows
        return pending

    def _free_memory(self, pending: PendingEntry) -> None:
        arena = self.arena
        assert arena is not None  # it has the block
        self.take_back(pending)
        if pending.body is None:
            arena.free(pending.offset, pending.nbytes)
            return
        pending.body = None  # the block is free once nobody reads the body either
        assert self._lent is not None  # it has lent the body
        self._lent.collect()


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.copy() for name, tensor in tensors.items()}
