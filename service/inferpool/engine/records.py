"""The records that web processes and engines send each other: their fields, in little-endian binary form.

A record begins with its length in bytes and its kind. Tensors are not in records, but in the arena; only
small outputs are in the record of their result.
"""

from __future__ import annotations

import json
from struct import Struct
from typing import Any, Final

from inferpool.error_fields import error_fields, error_from_fields
from inferpool.errors import InferpoolError

MAGIC: Final = b"IPCH"
PROTOCOL: Final = 2
"""The version of the records; both sides come from one installation, so a difference is an error."""

HEAD: Final = Struct("<IB")
"""Of every record: length with these fields, kind."""
HEAD_BYTES: Final = 5
MOST_BYTES: Final = 64 * 1024 * 1024
"""No record is longer."""
INLINE_BYTES: Final = 4096
"""Outputs of at most so many bytes travel in the record of their result."""
MOST_TENANT: Final = 1 << 48
"""Numbers of tenants are smaller."""
MOST_ID: Final = 1 << 40
"""Entry ids are smaller."""
MOST_ROWS: Final = 1 << 24

HELLO: Final = 1
LAYOUT: Final = 2
OFFER: Final = 3
CANCEL: Final = 4
RESULT: Final = 5
ERROR: Final = 6
NEED: Final = 7
GIVE: Final = 8
ENDED: Final = 9
ASK: Final = 10
REPLY: Final = 11

HELLO_FIELDS: Final = Struct("<IB3x4sHHQQ")
"""Length, kind, magic, protocol, web process, epoch, bytes of the arena. The first record of either side."""
LAYOUT_FIELDS: Final = Struct("<IB3xI")
"""Length, kind, number; then the layout as JSON. A number that is used again stands for the new layout."""
OFFER_FIELDS: Final = Struct("<IBBHiIIIQQQQQdddQdi")
"""Length, kind, flags, bytes of the request id, priority, layout, rows, parts, entry, offset and bytes of the
block, where in the block outputs begin, bytes of the inputs, arrived, deadline, row load; the tenant, its
share, and the priority before those of other tenants. Then come the request id and the parts."""
PART_FIELDS: Final = Struct("<IIIIQQQd")
"""Of a part of an entry: flags, layout, rows, nothing, entry, where in the block its inputs begin, bytes of
the inputs, row load; then the row indices, 4 bytes each."""
CANCEL_FIELDS: Final = Struct("<IBB2xQ")
"""Length, kind, reason (an index into `REASONS`), entry."""
RESULT_FIELDS: Final = Struct("<IBB2xIIQddIQQ")
"""Length, kind, flags, layout, rows, entry, queue_s, compute_s, rows of the batch, offset in the arena and
bytes of the outputs. With the flag INLINE the outputs follow, and the offset means nothing."""
ERROR_FIELDS: Final = Struct("<IBB2xQddI")
"""Length, kind, flags, entry, queue_s, compute_s, rows of the batch; then the error as JSON."""
NEED_FIELDS: Final = Struct("<IB3xQQ")
"""Length, kind, entry, bytes of its outputs."""
GIVE_FIELDS: Final = Struct("<IB3xQQQ")
"""Length, kind, entry, offset and bytes of the memory for outputs; 0 bytes if there is none."""
ENDED_FIELDS: Final = Struct("<IB3xQ")
"""Length, kind, entry."""
ASK_FIELDS: Final = Struct("<IB3xI")
"""Of ASK and REPLY: length, kind, number of the question; then JSON."""

ALONE: Final = 1
"""Flag of OFFER and parts: no other entry may share the run."""
SUSPECT: Final = 2
"""Flag of OFFER: the entry ran when an engine ended. Nothing else may run beside it."""
REPLAY: Final = 4
"""Flag of OFFER: an engine that ended had accepted the entry, so a full queue does not refuse it."""
RUNS_ON: Final = 1
"""Flag of RESULT and ERROR: a run still reads the block. ENDED follows."""
INLINE: Final = 2
"""Flag of RESULT: the outputs are in the record."""

REASONS: Final = ("disconnected", "deadline")
"""Why an entry is cancelled."""


class ProtocolError(Exception):
    """The other side sent what no record may be. The channel is closed, because nothing after it is sure."""


def check_length(length: int) -> None:
    """Raise ProtocolError if no record can have this length."""
    if not HEAD_BYTES <= length <= MOST_BYTES:
        raise ProtocolError(f"a record of {length} bytes came, expected {HEAD_BYTES} to {MOST_BYTES}")


def hello(web: int, epoch: int, arena_bytes: int) -> bytes:
    """Return the first record of either side."""
    return HELLO_FIELDS.pack(HELLO_FIELDS.size, HELLO, MAGIC, PROTOCOL, web, epoch, arena_bytes)


def check_hello(record: bytes, web: int, epoch: int, arena_bytes: int) -> None:
    """Raise ProtocolError unless `record` is the HELLO of the same channel."""
    if bytes(record) != hello(web, epoch, arena_bytes):
        raise ProtocolError(
            f"the other side greets with {bytes(record[:64])!r}; expected web process {web}, epoch {epoch}"
            f" and an arena of {arena_bytes} bytes"
        )


def json_record(fields: Struct, kind: int, number: int, value: object) -> bytes:
    """Return a record of LAYOUT, ASK or REPLY. Raises ProtocolError if it is too long."""
    body = json.dumps(value, separators=(",", ":")).encode()
    length = fields.size + len(body)
    check_length(length)
    return fields.pack(length, kind, number) + body


def read_json(record: bytes) -> Any:
    """Return the value that JSON stands for; raises ProtocolError if `record` is no JSON."""
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"JSON expected: {error}") from None


def error_body(error: InferpoolError) -> bytes:
    """Return an error as JSON."""
    return json.dumps(error_fields(error), default=str, separators=(",", ":")).encode()


def read_error(body: bytes) -> InferpoolError:
    """Return the error that `error_body` has written; raises ProtocolError if `body` is something else."""
    fields = read_json(body)
    if not isinstance(fields, dict):
        raise ProtocolError("an error that is no object came")
    try:
        return error_from_fields(fields)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
