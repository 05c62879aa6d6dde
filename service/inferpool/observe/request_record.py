"""What is known of a predict request when it ends: the line in the log and the spans are made of it."""

from __future__ import annotations

from typing import NamedTuple


class Record(NamedTuple):
    """One predict request. There is no payload in it, and nothing that grows with one.

    Attributes:
        time: when it ended, in seconds of Unix time.
        request_id: the caller's `X-Request-Id`, or the one it was given.
        trace_id: 32 hexadecimal digits; None where the request belongs to no trace.
        status: the HTTP status; 499 where the client left before it was answered.
        code: the error's code; "ok" where there is none.
        model: None where the request never named one that is served.
        version: the version's number, or None.
        rows: rows of the request; None where it was never in the queue.
        batch_rows: rows of the batch it ran in; None where it never ran.
        queue_s: seconds in the queue; None where it was never in it.
        compute_s: seconds that its batch ran; None where it never ran, or not to an end.
        total_s: seconds from the request's head to its end.
        bytes_in: bytes of its body that were taken in, as they came; 0 where it was refused before.
        bytes_out: bytes of the answer's body, before compression.
    """

    time: float
    request_id: str
    trace_id: str | None
    status: int
    code: str
    model: str | None
    version: int | None
    rows: int | None
    batch_rows: int | None
    queue_s: float | None
    compute_s: float | None
    total_s: float
    bytes_in: int
    bytes_out: int
