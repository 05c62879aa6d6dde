"""The facts about a predict request that has ended, for its log line and its spans."""

from __future__ import annotations

from typing import NamedTuple


class RequestRecord(NamedTuple):
    """One predict request, without its payload or anything that grows with the payload.

    Attributes:
        time: the end of the request, in seconds of Unix time.
        request_id: the client's `X-Request-Id`, or a generated one.
        trace_id: 32 hexadecimal digits; None if the request belongs to no trace.
        status: the HTTP status; 499 if the client disconnected before the response.
        code: the error code, or "ok".
        model: the model's name; None if the request named no model of the repository.
        version: the version number, or None.
        rows: rows of the request; None if the request was never queued.
        batch_rows: rows of the batch that the request ran in; None if it never ran.
        queue_s: seconds in the queue; None if the request was never queued.
        compute_s: seconds that its batch ran; None if the run never began or did not finish.
        total_s: seconds from the request's head to its end.
        bytes_in: bytes of the body that were received, before decompression; 0 if refused before the body.
        bytes_out: bytes of the response body, before compression.
        tenant: to whom the key belongs; None for a request without a key.
        key: the id of the key, which is no secret; None for a request without a key.
        client: the address of the client; None if it uses a Unix socket.
        method: the HTTP method; None if the request line could not be read.
        path: the path, without a query; None if the request line could not be read.
        left_out: requests with the same model and code since the last line, which have no line of their own.
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
    tenant: str | None = None
    key: str | None = None
    client: str | None = None
    method: str | None = None
    path: str | None = None
    left_out: int = 0
