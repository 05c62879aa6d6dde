"""What is counted of the requests for one version."""

from __future__ import annotations

from inferpool.observe.metrics import Metrics, Value
from inferpool.observe.prometheus_text import Exemplar
from inferpool.pool.ports import Result


class RequestStats:
    """How a version's requests ended and what they took, in seconds, since the server started.

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

    __slots__ = (
        "compute_s", "decode_s", "encode_s", "failure_s", "failures", "last", "queue_s", "rows", "success_s",
        "successes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.successes = self.failures = self.rows = 0
        self.success_s = self.failure_s = 0.0
        self.queue_s = self.decode_s = self.compute_s = self.encode_s = 0.0
        self.last: float | None = None


class RequestMetrics:
    """The metrics that the requests for one version are counted in."""

    def __init__(self, metrics: Metrics, model: str, version: str, stats: RequestStats) -> None:
        """Count into `stats`, and into `metrics` with the labels `model` and `version`."""
        self._metrics = metrics
        self._labels = (model, version)
        self._stats = stats
        self._by_status: dict[int, Value] = {}
        self._total = metrics.distribution("request_duration_seconds", model, version)
        self._queue = metrics.distribution("queue_duration_seconds", model, version)
        self._compute = metrics.distribution("compute_duration_seconds", model, version)

    def succeeded(
        self, rows: int, decode_s: float, encode_s: float, total_s: float, now: float, result: Result
    ) -> None:
        """Count a request that was answered with outputs at the moment `now`."""
        self._count(200, total_s)
        self._queue.observe(result.queue_s)
        self._compute.observe(result.compute_s)
        stats = self._stats
        stats.successes += 1
        stats.success_s += total_s
        stats.rows += rows
        stats.queue_s += result.queue_s
        stats.decode_s += decode_s
        stats.compute_s += result.compute_s
        stats.encode_s += encode_s
        stats.last = now

    def failed(self, status: int, total_s: float) -> None:
        """Count a request that ended with an error."""
        self._count(status, total_s)
        self._stats.failures += 1
        self._stats.failure_s += total_s

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
        value.value += 1
        self._total.observe(total_s)
