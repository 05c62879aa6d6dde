"""Chooses between a model's stable version and its canary, and counts how their requests end."""

from __future__ import annotations

from bisect import bisect_left
from hashlib import blake2b
from typing import Final

from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_metrics import RequestMetrics, RequestStats
from inferpool.http.predict.served_version import ServedVersion
from inferpool.observe.families import TRIAL, TRIAL_BOUNDS
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Result, VersionKey
from inferpool.repository.traffic import BY_HEADER, BY_KEY, BY_TENANT, Canary

_FAILURES: Final = frozenset({"model_failed", "model_crashed", "run_timeout", "internal_error"})
"""The errors that count against a version. The others are caused by clients, or by a lack of room."""
_HASHES: Final = 1 << 64
_FAILED: Final = 1
_FIRST_TIME: Final = 2


class TrialMetrics(RequestMetrics):
    """Counts requests as usual, and once more for the trial in which a canary and the stable version are."""

    def __init__(
        self, metrics: Metrics, key: VersionKey, stats: RequestStats, number: int, bounds: tuple[float, ...]
    ) -> None:
        """`number` is that of the trial; numbers of an earlier one are forgotten. `bounds` are in seconds."""
        super().__init__(metrics, key.model, str(key.version), stats)
        self._number = float(number)
        self._bounds = bounds
        self._cells = begin_cells(metrics.cells(TRIAL, key.model, str(key.version)), number)

    def succeeded(
        self, rows: int, decode_s: float, encode_s: float, total_s: float, now: float, result: Result
    ) -> None:
        """Count a request that was answered with outputs at the moment `now`."""
        super().succeeded(rows, decode_s, encode_s, total_s, now, result)
        if not result.batch_rows:
            return  # the cache has answered, or another request's run, which tells nothing of the version
        # Not the time that the client took to send its body.
        self._add(_FIRST_TIME + bisect_left(self._bounds, result.queue_s + result.compute_s))

    def failed(self, status: int, total_s: float, code: str, *, by_server: bool) -> None:
        """Count a request that ended with the error `code`."""
        super().failed(status, total_s, code, by_server=by_server)
        if code in _FAILURES:
            self._add(_FAILED)

    def _add(self, index: int) -> None:
        cells = self._cells
        if cells[0] == self._number:  # else a later trial counts
            cells[index] += 1.0


def begin_cells(cells: memoryview[float], number: int) -> memoryview[float]:
    """Return `cells`, which begin at zero unless they are those of the trial `number` already."""
    if cells[0] != number:
        # Other processes read none of these numbers until the first one is right.
        cells[0] = 0.0
        for index in range(1, len(cells)):
            cells[index] = 0.0
        cells[0] = number
    return cells


class CanaryChoice:
    """Chooses the version that answers a request which names none.

    Attributes:
        header: the name of the header that decides, in small letters; None if another thing does.
        canary: the canary; None if there is only a shadow.
        stable: the version that answers the other requests.
    """

    __slots__ = ("_by", "_salt", "_threshold", "canary", "header", "stable")

    def __init__(self, stable: ServedVersion, canary: ServedVersion | None, rule: Canary | None) -> None:
        """`rule` says which requests are the canary's; None if there is none."""
        self.stable = stable
        self.canary = canary
        self.header: bytes | None = None
        self._by = ""
        self._salt = b""
        self._threshold = 0
        if rule is not None:
            self._by = rule.by
            # So a larger share keeps its callers, and the next canary gets others.
            self._salt = f"{stable.view.key.model}/{rule.version}".encode()
            self._threshold = int(rule.share * _HASHES)
            if rule.by.startswith(BY_HEADER):
                self.header = rule.by[len(BY_HEADER) :].encode()

    def choose(self, context: PredictContext) -> ServedVersion:
        """Return the version that answers a request, always the same one for the same caller."""
        canary = self.canary
        if canary is None:
            return self.stable
        name = self._name(context)
        if name is None:
            return self.stable
        digest = blake2b(self._salt + b"\0" + name, digest_size=8).digest()
        return canary if int.from_bytes(digest, "big") < self._threshold else self.stable

    def _name(self, context: PredictContext) -> bytes | None:
        """Return what is the same for all requests of a caller; None if the request does not tell."""
        header = self.header
        if header is not None:
            kept = context.head.kept
            return None if kept is None else kept.get(header)
        if self._by == BY_KEY:
            return context.caller.key_id.encode() or None
        if self._by == BY_TENANT:
            return context.caller.tenant.encode() or None
        return context.request_id.encode()


def trial_metrics(metrics: Metrics, key: VersionKey, stats: RequestStats, number: int) -> TrialMetrics:
    """Return the metrics of a version in the trial `number`."""
    return TrialMetrics(metrics, key, stats, number, TRIAL_BOUNDS)
