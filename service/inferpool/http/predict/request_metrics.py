"""The counters of the requests for one version."""

from __future__ import annotations

from typing import NamedTuple

from inferpool.observe.families import REQUEST_STATS
from inferpool.observe.metrics import Distribution, Metrics, Value
from inferpool.observe.prometheus_text import Exemplar
from inferpool.pool.ports import Result


class RequestTotals(NamedTuple):
    """How a version's requests ended and what they took, in seconds, in all processes since the start.

    Attributes:
        successes: requests that were answered with outputs.
        success_s: seconds from the heads of the successes to their responses.
        failures: requests that ended with an error after their version was known.
        failure_s: seconds from the heads of the failures to their responses.
        rows: rows of the successes.
        queue_s: seconds that the successes waited in the queue.
        decode_s: seconds that decoding and checking their inputs took.
        compute_s: seconds that their batches ran.
        encode_s: seconds that encoding their outputs took.
        last: moment of the last success by the predictor's clock; None before the first.
    """

    successes: int
    success_s: float
    failures: int
    failure_s: float
    rows: int
    queue_s: float
    decode_s: float
    compute_s: float
    encode_s: float
    last: float | None


class RequestStats:
    """What this process counts of a version's requests beside the metrics; see `RequestTotals`.

    Attributes:
        shared: where other processes see the numbers, in the order of `__init__`; None if none does.
    """

    __slots__ = ("decode_s", "encode_s", "last", "rows", "shared", "success_s")

    def __init__(self, shared: memoryview[float] | None = None) -> None:
        """Go on from the numbers in `shared`, which a predecessor of this process left there."""
        self.shared = shared
        self.success_s = self.rows = self.decode_s = self.encode_s = 0.0
        self.last = 0.0
        if shared is not None:
            self.success_s, self.rows, self.decode_s, self.encode_s, self.last = shared

    def succeeded(self, total_s: float, rows: int, decode_s: float, encode_s: float, now: float) -> None:
        """Count a request that was answered with outputs at the moment `now`."""
        self.success_s += total_s
        self.rows += rows
        self.decode_s += decode_s
        self.encode_s += encode_s
        self.last = now
        shared = self.shared
        if shared is not None:
            shared[0] = self.success_s
            shared[1] = self.rows
            shared[2] = self.decode_s
            shared[3] = self.encode_s
            shared[4] = now

    def numbers(self) -> list[float]:
        """The numbers, in the order of `shared`."""
        return [self.success_s, self.rows, self.decode_s, self.encode_s, self.last]


class RequestMetrics:
    """The metrics that the requests for one version are counted in."""

    def __init__(self, metrics: Metrics, model: str, version: str, stats: RequestStats) -> None:
        """Count into `stats`, and into `metrics` with the labels `model` and `version`."""
        self._metrics = metrics
        self._labels = (model, version)
        self._stats = stats
        self._by_status: dict[int, Value] = {}
        self._server_errors: Value | None = None
        self._total: Distribution = metrics.distribution("request_duration_seconds", model, version)
        self._queue: Distribution = metrics.distribution("queue_duration_seconds", model, version)
        self._compute: Distribution = metrics.distribution("compute_duration_seconds", model, version)

    def succeeded(
        self, rows: int, decode_s: float, encode_s: float, total_s: float, now: float, result: Result
    ) -> None:
        """Count a request that was answered with outputs at the moment `now`."""
        self._count(200, total_s)
        self._queue.observe(result.queue_s)
        self._compute.observe(result.compute_s)
        self._stats.succeeded(total_s, rows, decode_s, encode_s, now)

    def failed(self, status: int, total_s: float, code: str, *, by_server: bool) -> None:
        """Count a request that ended with the error `code`.

        `by_server` tells whether the server is responsible.
        """
        self._count(status, total_s)
        if by_server:
            if self._server_errors is None:
                self._server_errors = self._metrics.value("server_errors_total", *self._labels)
            self._server_errors.add(1.0)

    def exemplify(self, exemplar: Exemplar, result: Result | None) -> None:
        """Make a counted request the exemplar of its buckets."""
        self._total.exemplify(exemplar)
        if result is not None and result.error is None:
            self._queue.exemplify(exemplar._replace(amount=result.queue_s))
            self._compute.exemplify(exemplar._replace(amount=result.compute_s))

    def _count(self, status: int, total_s: float) -> None:
        value = self._by_status.get(status)
        if value is None:
            value = self._metrics.value("requests_total", *self._labels, str(status))
            self._by_status[status] = value
        value.add(1.0)
        self._total.observe(total_s)


def request_totals(metrics: Metrics, model: str, version: str, stats: RequestStats | None) -> RequestTotals:
    """What all processes have counted of a version's requests; `stats` is what this one has counted."""
    numbers = metrics.hidden_series(REQUEST_STATS, model, version).get((model, version), [])
    if stats is not None and stats.shared is None:
        numbers = [*numbers, stats.numbers()]
    success_s, rows, decode_s, encode_s = (sum(each[index] for each in numbers) for index in range(4))
    *counts, total_s = metrics.total("request_duration_seconds", model, version)
    *queued, queue_s = metrics.total("queue_duration_seconds", model, version)
    compute_s = metrics.total("compute_duration_seconds", model, version)[-1]
    successes = int(sum(queued))
    return RequestTotals(
        successes=successes,
        success_s=success_s,
        # Another process may be between the two that it counts.
        failures=max(0, int(sum(counts)) - successes),
        failure_s=max(0.0, total_s - success_s),
        rows=int(rows),
        queue_s=queue_s,
        decode_s=decode_s,
        compute_s=compute_s,
        encode_s=encode_s,
        last=max((each[4] for each in numbers), default=0.0) or None,
    )
