"""Records a request that has ended: a line in the access log, spans, an exemplar in the metrics."""

from __future__ import annotations

import logging
import time
from typing import Final

from inferpool.http.access.trusted_proxies import TrustedProxies
from inferpool.http.predict.context import PredictContext
from inferpool.observe.logs import AccessLog
from inferpool.observe.prometheus_text import Exemplar
from inferpool.observe.request_record import RequestRecord
from inferpool.observe.spans import Moments, Spans
from inferpool.pool.ports import Result

log = logging.getLogger(__name__)

CLIENT_GONE: Final = 499
"""The status in the log of a request whose client disconnected; it is never sent."""


class RequestRecorder:
    """Records how requests ended. It runs on the event loop; threads format and write the records.

    Attributes:
        follows_all: whether to record successful requests that belong to no trace.
    """

    def __init__(
        self,
        access: AccessLog | None = None,
        spans: Spans | None = None,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """Without `access` nothing is logged; without `spans` no spans are sent.

        `proxies` pass on requests of clients.
        """
        self._proxies = proxies
        self._access = access
        self._spans = spans
        self.follows_all = spans is not None or (access is not None and access.wants(200))

    def ended(
        self,
        context: PredictContext,
        status: int,
        code: str,
        bytes_out: int,
        ended: float,
        result: Result | None,
        model: str | None = None,
    ) -> None:
        """Record a request that ended at the moment `ended` of the predictor's clock; call once a request.

        `model` is the name of a model that the catalog has, if the request failed before a version was found.
        A record that cannot be made is missing from the log, and the request is answered all the same.
        """
        context.recorded = True
        try:
            self._record(context, status, code, bytes_out, ended, result, model)
        except Exception:
            log.exception("request %s could not be recorded", context.request_id)

    def _record(
        self,
        context: PredictContext,
        status: int,
        code: str,
        bytes_out: int,
        ended: float,
        result: Result | None,
        model: str | None,
    ) -> None:
        trace = context.head.trace
        if self._spans is not None:
            trace = self._spans.sample(trace)
        sampled = trace is not None and trace.sampled
        logs = self._access is not None and self._access.wants(status)
        if not (sampled or logs):
            return
        served, entry = context.served, context.entry
        if served is not None:
            model = served.view.key.model
        now, left_out = time.time(), 0
        if logs and self._access is not None and self._access.throttles(status):
            left_out = self._access.admit(model, code, now)
            logs = left_out >= 0
            if not (sampled or logs):
                return
        head, caller, peer, proxies = context.head, context.caller, context.peer, self._proxies
        record = RequestRecord(
            now,
            context.request_id,
            trace.id if trace is not None else None,
            status,
            code,
            model,
            served.view.key.version if served is not None else None,
            entry.rows if entry is not None else None,
            (result.batch_rows or None) if result is not None else None,
            result.queue_s if result is not None else None,
            (result.compute_s or None) if result is not None else None,
            ended - context.began,
            context.reserved_bytes,
            bytes_out,
            caller.tenant or None,
            caller.key_id or None,
            (peer if proxies is None else proxies.client(peer, head.forwarded)) or None,
            head.method if head.path else None,
            head.path or None,
            left_out,
        )
        if logs and self._access is not None:
            self._access.put(record)
        if sampled and trace is not None:
            if served is not None and status != CLIENT_GONE:
                served.metrics.exemplify(Exemplar(trace.id, record.total_s, record.time), result)
            if self._spans is not None:
                offered = entry.arrived if entry is not None else None
                self._spans.put(record, trace, Moments(context.began, offered, ended))
