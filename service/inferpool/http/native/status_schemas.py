"""The body of `/status`: what `/models` and `/health` tell, with the figures of the whole server."""

from __future__ import annotations

from collections.abc import Mapping

from inferpool import __version__
from inferpool.http.body_model import BodyModel
from inferpool.http.native.schemas import (
    HealthOut,
    Latency,
    Model,
    Version,
    health_out,
    model_out,
)
from inferpool.observe.families import FAMILIES
from inferpool.observe.metrics import Labels, Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import Catalog

Numbers = Mapping[str, Mapping[Labels, float]]
Histograms = Mapping[str, Mapping[Labels, list[float]]]


class HistogramOut(BodyModel):
    """Durations in seconds: how many were at most each of `bounds`, but not of the one before.

    `counts` has one number more than `bounds`, for those above all bounds.
    """

    bounds: list[float]
    counts: list[int]
    sum: float


class BatchesOut(BodyModel):
    """Batches of exactly `rows` rows: how many ran, and for how long in total."""

    rows: int
    runs: int
    compute_ms: float


class FiguresOut(BodyModel):
    """What was counted of a version since the server started, and what waits now.

    `requests` is by HTTP status, `dropped` by reason, and `reasons` counts batches by why they were no
    larger. `cache` counts requests to a model with a cache by outcome: `hit`, `miss` or `shared`.
    """

    requests: dict[str, int]
    duration: HistogramOut
    queue: HistogramOut
    compute: HistogramOut
    batches: list[BatchesOut]
    reasons: dict[str, int]
    dropped: dict[str, int]
    cache: dict[str, int]
    replayed: int
    crashed: int
    queue_oldest_ms: float
    queue_wait_ms: float


class VersionStatus(Version):
    """A version with its measured latency and its figures."""

    latency: list[Latency]
    figures: FiguresOut


class ModelStatus(Model):
    """A model with the figures of its versions."""

    versions: list[VersionStatus]  # type: ignore[assignment]


class CardOut(BodyModel):
    """A GPU; a figure is null if its driver does not tell it."""

    device: str
    utilization: float | None
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    temperature_celsius: float | None
    power_watts: float | None


class ServerOut(BodyModel):
    """The figures of the server itself.

    `refused_keys` and `refused_connections` are by reason. `memory_held` is a share of the limit in whole
    percents, so that the body stays the same while nothing happens.
    """

    version: str
    in_flight_requests: int
    memory_held: float | None
    memory_limit_bytes: float | None
    engine_restarts: int
    refused_keys: dict[str, int]
    refused_connections: dict[str, int]
    cards: list[CardOut]


class StatusOut(BodyModel):
    """The health of the server, its models, and the figures of all its processes."""

    server: ServerOut
    health: HealthOut
    models: list[ModelStatus]


def status_out(catalog: Catalog, metrics: Metrics) -> StatusOut:
    """The response body for the whole server. May be called from any thread."""
    numbers, histograms = metrics.figures()
    models = []
    for view in catalog.models().values():
        model = model_out(view, catalog, metrics).model_dump()
        for version in model["versions"]:
            key = VersionKey(view.name, version["version"])
            version["figures"] = _figures(key, catalog, numbers, histograms)
        models.append(ModelStatus.model_validate(model))
    return StatusOut(server=_server(numbers), health=health_out(catalog.health()), models=models)


def _figures(key: VersionKey, catalog: Catalog, numbers: Numbers, histograms: Histograms) -> FiguresOut:
    labels = (key.model, str(key.version))
    live = catalog.live(key)
    return FiguresOut(
        requests=_by(numbers["requests_total"], labels, 2),
        duration=_histogram("request_duration_seconds", labels, histograms),
        queue=_histogram("queue_duration_seconds", labels, histograms),
        compute=_histogram("compute_duration_seconds", labels, histograms),
        batches=[
            BatchesOut(rows=line.rows, runs=line.runs, compute_ms=round(1000 * line.compute_s, 3))
            for line in live.batches
        ],
        reasons=_by(numbers["batches_total"], labels, 3),
        dropped=_by(numbers["dropped_entries_total"], labels, 2),
        cache=_by(numbers["cache_requests_total"], labels, 2),
        replayed=int(numbers["replayed_entries_total"].get(labels, 0)),
        crashed=int(numbers["crashed_entries_total"].get(labels, 0)),
        queue_oldest_ms=round(1000 * live.oldest_age_s, 3),
        queue_wait_ms=round(1000 * live.wait_s, 3),
    )


def _by(series: Mapping[Labels, float], first: Labels, index: int) -> dict[str, int]:
    """The counts above 0 of the series that begin with the label values `first`, by the one at `index`."""
    found: dict[str, int] = {}
    for labels, number in series.items():
        if labels[: len(first)] == first and number > 0:
            found[labels[index]] = found.get(labels[index], 0) + int(number)
    return dict(sorted(found.items()))


def _histogram(name: str, labels: Labels, histograms: Histograms) -> HistogramOut:
    family = FAMILIES[name]
    *counts, total = histograms[name].get(labels, [0.0] * family.cells)
    return HistogramOut(bounds=list(family.bounds), counts=[int(count) for count in counts], sum=total)


def _server(numbers: Numbers) -> ServerOut:
    def gauge(name: str, *labels: str) -> float | None:
        return numbers[name].get(labels)

    held, limit = gauge("memory_held_bytes"), gauge("memory_limit_bytes")
    return ServerOut(
        version=__version__,
        in_flight_requests=int(gauge("in_flight_requests") or 0),
        memory_held=round(held / limit, 2) if held is not None and limit else None,
        memory_limit_bytes=limit,
        engine_restarts=int(sum(numbers["engine_restarts_total"].values())),
        refused_keys=_by(numbers["refused_keys_total"], (), 0),
        refused_connections=_by(numbers["refused_connections_total"], (), 0),
        cards=[
            CardOut(
                device=device,
                utilization=gauge("gpu_utilization_ratio", device),
                memory_used_bytes=gauge("gpu_memory_used_bytes", device),
                memory_total_bytes=total,
                temperature_celsius=gauge("gpu_temperature_celsius", device),
                power_watts=gauge("gpu_power_watts", device),
            )
            for (device,), total in sorted(numbers["gpu_memory_total_bytes"].items())
        ],
    )
