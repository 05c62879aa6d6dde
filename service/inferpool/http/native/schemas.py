"""The response bodies of the native routes, with their schemas in the OpenAPI document."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson

from inferpool.http.body_model import BodyModel
from inferpool.http.native.bodies import media_types
from inferpool.http.native.traffic_schemas import TrafficOut, traffic_out
from inferpool.observe.metrics import Metrics
from inferpool.repository.catalog import Catalog, GpuView, Health, LiveView, ModelView, VersionView
from inferpool.repository.drift_figures import DriftFigures, drift_figures
from inferpool.tensors import TensorSpec

_MOST_NAMES: Final = 100
"""Names of classes that a response has; a model may have many thousands."""


class Tensor(BodyModel):
    """An input or output: -1 is a dimension of any size, a shape of null is of any rank."""

    name: str
    datatype: str
    shape: list[int] | None
    optional: bool = False


class Batching(BodyModel):
    """Whether rows of several requests run together, and the reason.

    `evidence` tells whether reading the graph or running the model has shown that they may.
    """

    enabled: bool
    reason: str
    evidence: Literal["graph", "runs"] | None
    max_rows: int
    max_delay_ms: float


class InstanceOut(BodyModel):
    """One loaded copy with its own thread.

    It is `lost` if its thread has ended, `hung` if its run does not stop, and `not_answering` if its engine
    does not answer, or is being restarted.
    """

    device: str
    state: Literal["ready", "lost", "hung", "not_answering"]


class EngineOut(BodyModel):
    """The process that runs a version, and how many processes it has replaced since the server started."""

    name: str
    pid: int
    restarts: int


class Latency(BodyModel):
    """The measured latency of batches with about this many rows.

    A row that is smaller than those that were measured at load counts as less than one.
    """

    rows: float
    compute_ms: float
    runs: int


class Cost(BodyModel):
    """The cost of a row of so many elements: alone, and in rows of the size that `latency` counts.

    `compute_ms` is null if nothing was measured: the cost then grows like the elements.
    """

    elements: int
    compute_ms: float | None
    rows: float


class Rounding(BodyModel):
    """The largest differences of the outputs from those in FP32, over this many rows."""

    absolute: float
    relative: float
    changed: float
    rows: int


class Gpu(BodyModel):
    """How a version runs on GPUs: its nodes on the CPU, and the sizes to which batches are padded."""

    cpu_nodes: dict[str, int]
    batch_rows: list[int]
    padding: str
    precision: str
    difference: Rounding | None
    graphs: bool | str
    pixels: str | None
    tensorrt: str | None


class Version(BodyModel):
    """A version of a model; `gpu` is null on the CPU, `engine` if the server itself runs the model.

    `engines` are all processes that run it: one for each device of its instances, or several.

    `digest` is the SHA-256 of the model file; with external data, of the names and digests of all its files.
    It is null while the version is not loaded. `phase` is what a load does at the moment, also one beside a
    version that serves; null without a load.

    `row_cost` has the measured sizes of a row, smallest first; null if all rows cost the same. Between them,
    and above the largest, the cost follows a power of the elements.
    """

    version: int
    state: Literal["loading", "ready", "draining", "unloaded", "failed"]
    phase: str | None
    reason: str
    labels: list[str]
    backend: str
    digest: str | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    batching: Batching
    row_cost: list[Cost] | None
    instances: list[InstanceOut]
    engine: EngineOut | None
    engines: list[EngineOut]
    gpu: Gpu | None
    threads: int
    queue_rows: int
    load_ms: float
    media_types: list[str]


class FieldDriftOut(BodyModel):
    """How far a field of the requests is from the version's profile; `ks` is null for categories.

    `rows` is about how many rows were counted.
    """

    field: str
    rows: int
    psi: float
    ks: float | None
    js: float


class DriftOut(BodyModel):
    """The drift of the last window: its length and end, and the fields with enough rows, farthest first.

    `epsilon` is that of the noise in the counts of each field. `ended` is null before the first window.
    """

    window_s: float
    epsilon: float
    ended: datetime | None
    fields: list[FieldDriftOut]


class VersionDetail(Version):
    """A version with its measured latency by batch size, and the names of its first 100 classes.

    `classes` is how many classes it has; null if its classes have no names. `drift` is null without a
    profile. `sampled` is the share of its requests of which samples are kept, if the server keeps any.
    """

    latency: list[Latency]
    classes: int | None
    class_names: list[str]
    drift: DriftOut | None
    sampled: float


class Model(BodyModel):
    """A model and its versions; `default` answers requests that name no version, unless a canary does."""

    name: str
    description: str
    default: int | None
    labels: dict[str, int]
    traffic: TrafficOut
    versions: list[Version]


class ModelDetail(Model):
    """A model with the measured latency of its versions."""

    versions: list[VersionDetail]  # type: ignore[assignment]


class SampleOut(BodyModel):
    """A golden sample: the name of its file, and inputs as a request has them."""

    name: str
    inputs: Any


class SamplesOut(BodyModel):
    """The golden samples of a version that are small enough to be shown."""

    samples: list[SampleOut]


class Models(BodyModel):
    """Every model in the repository."""

    models: list[Model]


class HealthOut(BodyModel):
    """The health of the server; the keys of `problems` are `model/version`."""

    status: Literal["ok", "degraded", "loading", "draining", "unavailable"]
    ready: bool
    problems: dict[str, str]


class LiveOut(BodyModel):
    """Whether the process answers: it does if this arrives."""

    live: bool = True


class ReadyOut(BodyModel):
    """Whether every required model can answer."""

    ready: bool


class Problem(BodyModel):
    """An error (RFC 9457). Clients match `code`, which is stable; further members give details."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


def health_out(health: Health) -> HealthOut:
    """The response body for `health`."""
    return HealthOut.model_validate(
        {"status": health.status, "ready": health.ready, "problems": dict(health.problems)}
    )


def model_out(model: ModelView, catalog: Catalog, metrics: Metrics) -> ModelDetail:
    """The response body for a model, with all details."""
    default = model.default
    return ModelDetail(
        name=model.name,
        description=model.description,
        default=default.key.version if default is not None else None,
        labels=dict(model.labels),
        traffic=traffic_out(model, metrics),
        versions=[version_out(view, catalog, metrics) for _, view in sorted(model.versions.items())],
    )


def version_out(view: VersionView, catalog: Catalog, metrics: Metrics) -> VersionDetail:
    """The response body for a version, with all details."""
    live = catalog.live(view.key)
    batching = view.batching
    return VersionDetail(
        version=view.key.version,
        state=view.state,
        phase=live.phase,
        reason=view.reason,
        labels=list(view.labels),
        backend=view.backend,
        digest=view.digest or None,
        inputs=[_tensor(spec, view.signature.is_optional(spec)) for spec in view.signature.inputs]
        if view.signature
        else [],
        outputs=[_tensor(spec) for spec in view.signature.outputs] if view.signature else [],
        batching=Batching(
            enabled=batching.enabled and not live.batching_stopped,
            reason=f"turned off while serving: {live.batching_stopped}"
            if live.batching_stopped
            else batching.reason,
            evidence=None if live.batching_stopped or batching.evidence is None else batching.evidence.value,
            max_rows=1 if live.batching_stopped else min([batching.max_rows, *live.buckets[-1:]]),
            max_delay_ms=batching.max_delay_ms,
        ),
        row_cost=_row_cost(view),
        instances=[
            InstanceOut.model_validate({"device": item.device, "state": item.state})
            for item in live.instances
        ],
        engine=None if live.engine is None else EngineOut(**asdict(live.engine)),
        engines=[EngineOut(**asdict(engine)) for engine in live.engines],
        gpu=_gpu(view.gpu, live),
        threads=view.threads,
        queue_rows=live.waiting_rows,
        load_ms=round(1000 * (view.load_s or live.loading_s), 3),
        media_types=media_types(view) if view.signature else [],
        latency=[
            Latency(rows=round(line.rows, 2), compute_ms=round(1000 * line.seconds, 4), runs=line.runs)
            for line in live.latency
        ],
        classes=None if view.classes is None else len(view.classes.names),
        class_names=[] if view.classes is None else list(view.classes.names[:_MOST_NAMES]),
        drift=_drift(drift_figures(view, metrics, time.time())),
        sampled=view.sampling.get("share", 0.0),
    )


def samples_out(view: VersionView) -> SamplesOut:
    """The response body for the golden samples of a version."""
    return SamplesOut(
        samples=[SampleOut(name=sample.name, inputs=orjson.loads(sample.inputs)) for sample in view.samples]
    )


def _drift(figures: DriftFigures | None) -> DriftOut | None:
    if figures is None:
        return None
    return DriftOut(
        window_s=figures.window_s,
        epsilon=figures.epsilon,
        ended=None if figures.ended is None else datetime.fromtimestamp(figures.ended, UTC),
        fields=[
            FieldDriftOut(
                field=each.name,
                rows=each.rows,
                psi=round(each.distances.psi, 4),
                ks=None if each.distances.ks is None else round(each.distances.ks, 4),
                js=round(each.distances.js, 4),
            )
            for each in sorted(figures.fields, key=lambda each: -each.distances.psi)
        ],
    )


def _row_cost(view: VersionView) -> list[Cost] | None:
    if view.row_cost is None:
        return None
    return [
        Cost(
            elements=point.elements,
            compute_ms=round(1000 * point.seconds, 4) if point.seconds else None,
            rows=round(view.row_cost.load(point.elements), 3),
        )
        for point in view.row_cost.points
    ]


def _gpu(view: GpuView | None, live: LiveView) -> Gpu | None:
    if view is None:
        return None
    return Gpu(
        cpu_nodes=dict(view.cpu_nodes),
        batch_rows=list(live.buckets),
        padding=view.padding,
        precision=view.precision,
        difference=None if view.difference is None else Rounding(**asdict(view.difference)),
        graphs=view.graphs.ok or view.graphs.reason,
        pixels=view.pixels,
        tensorrt=live.tensorrt,
    )


def _tensor(spec: TensorSpec, optional: bool = False) -> Tensor:
    shape = None if spec.shape is None else list(spec.shape)
    return Tensor(name=spec.name, datatype=spec.datatype, shape=shape, optional=optional)
