"""What remains of a request when it has ended: its line in the log, its spans, its place as an exemplar."""

from __future__ import annotations

import time
from typing import Final

from inferpool.http.predict.context import PredictContext
from inferpool.observe.logs import AccessLog
from inferpool.observe.prometheus_text import Exemplar
from inferpool.observe.request_record import RequestRecord
from inferpool.observe.spans import Moments, Spans
from inferpool.pool.ports import Result

CLIENT_GONE: Final = 499
"""The status in the log of a request whose client left; nothing is sent with it."""


class RequestRecorder:
    """Records how requests ended. It runs on the event loop, and leaves all but the notes to threads."""

    def __init__(self, access: AccessLog | None = None, spans: Spans | None = None) -> None:
        """Without an access log nothing is logged, without spans none are sent."""
        self._access = access
        self._spans = spans
        self.follows_all = spans is not None or (access is not None and access.wants(200))
        """Whether a request that went well and belongs to no trace is of interest."""

    def ended(
        self,
        call: PredictContext,
        status: int,
        code: str,
        bytes_out: int,
        ended: float,
        result: Result | None,
    ) -> None:
        """Record a request that ended at the moment `ended` of the predictor's clock; once for each."""
        call.recorded = True
        trace = call.head.trace
        if self._spans is not None:
            trace = self._spans.sample(trace)
        sampled = trace is not None and trace.sampled
        logs = self._access is not None and self._access.wants(status)
        if not (sampled or logs):
            return
        served, entry = call.served, call.entry
        record = RequestRecord(
            time.time(),
            call.request_id,
            trace.id if trace is not None else None,
            status,
            code,
            served.view.key.model if served is not None else None,
            served.view.key.version if served is not None else None,
            entry.rows if entry is not None else None,
            (result.batch_rows or None) if result is not None else None,
            result.queue_s if result is not None else None,
            (result.compute_s or None) if result is not None else None,
            ended - call.began,
            call.reserved_bytes,
            bytes_out,
        )
        if logs and self._access is not None:
            self._access.put(record)
        if sampled and trace is not None:
            if served is not None and status != CLIENT_GONE:
                served.meters.exemplify(Exemplar(trace.id, record.total_s, record.time), result)
            if self._spans is not None:
                offered = entry.arrived if entry is not None else None
                self._spans.put(record, trace, Moments(call.began, offered, ended))
