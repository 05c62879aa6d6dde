"""The bodies of the `/v2` routes except infer: those of the protocol and of Triton's extensions.

Sources: the protocol's REST page for metadata and health; Triton's pages on the model configuration,
statistics and model repository extensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, Field

from inferpool import __version__
from inferpool.http.predict.request_metrics import RequestStats
from inferpool.repository.catalog import LiveView, ModelView, State, VersionView
from inferpool.tensors import ANY, JSON, TensorSpec

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""The extensions of Triton that `/v2` implements, by Triton's names."""

_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "torch": "pytorch_libtorch"}
_BACKENDS = {"torch": "pytorch"}
_NANOSECONDS = 1_000_000_000


class Error(BaseModel):
    """An error of `/v2`. Clients match `code`, which is stable."""

    error: str
    code: str


class Server(BaseModel):
    """The server and the protocol extensions that it has."""

    name: str = "inferpool"
    version: str = __version__
    extensions: list[str] = list(EXTENSIONS)


class Live(BaseModel):
    """Whether the process answers: it does if this arrives."""

    live: bool = True


class Ready(BaseModel):
    """Whether every required model can answer; if not, `error` has the reason."""

    ready: bool
    error: str | None = None
    code: str | None = None


class ModelReady(BaseModel):
    """Whether the model can answer; otherwise the response is an error."""

    name: str
    ready: bool = True


class ModelNames(BaseModel):
    """The names of the models in the repository."""

    models: list[str]


class Metadata(BaseModel):
    """An input or output: -1 is a dimension of any size; the shape is `[-1]` if the rank is open."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Metadata]
    outputs: list[Metadata]


class ConfigInput(BaseModel):
    """An input; if requests are batched, `dims` leaves out the rows."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool


class ConfigOutput(BaseModel):
    """An output; if requests are batched, `dims` leaves out the rows."""

    name: str
    data_type: str
    dims: list[int]


class InstanceGroup(BaseModel):
    """The instances on one device."""

    name: str
    kind: Literal["KIND_CPU", "KIND_GPU"]
    count: int
    gpus: list[int]


class SpecificVersions(BaseModel):
    """The versions that are served, by number."""

    versions: list[int]


class VersionPolicy(BaseModel):
    """Which versions are served."""

    specific: SpecificVersions


class DynamicBatching(BaseModel):
    """How rows of several requests are gathered; without preferred sizes all are equally good."""

    preferred_batch_size: list[int]
    max_queue_delay_microseconds: int


class ModelConfig(BaseModel):
    """A model's configuration in Triton's terms; `max_batch_size` 0 means that it is not batched."""

    name: str
    platform: str
    backend: str
    version_policy: VersionPolicy
    max_batch_size: int
    input: list[ConfigInput]
    output: list[ConfigOutput]
    instance_group: list[InstanceGroup]
    dynamic_batching: DynamicBatching | None = None


class Duration(BaseModel):
    """A count and the total duration; both are 0 if the step is not measured."""

    count: int
    ns: int


class InferenceStats(BaseModel):
    """Requests by outcome, and the phases of those that succeeded.

    `compute_input` is for reading and checking tensors, `compute_infer` for the runs of the batches, and
    `compute_output` for writing responses.
    """

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class BatchStats(BaseModel):
    """Batches of one size; gathering and scattering are measured per request only."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class VersionStats(BaseModel):
    """The statistics of a version since the server started.

    `last_inference` is in milliseconds since 1970, or 0 before the first; `inference_count` counts rows,
    `execution_count` batches.
    """

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class Statistics(BaseModel):
    """The statistics of several versions."""

    model_stats: list[VersionStats]


class IndexEntry(BaseModel):
    """A version in the repository, with its state."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class IndexQuery(BaseModel):
    """Which versions to list."""

    ready: bool = Field(False, description="List only versions that can answer.")


def metadata_out(model: ModelView, view: VersionView) -> ModelMetadata:
    """The metadata of a ready version."""
    assert view.signature is not None  # the version is ready
    return ModelMetadata(
        name=model.name,
        versions=[str(number) for number in sorted(model.versions)],
        platform=_PLATFORMS.get(_runtime(view), _runtime(view)),
        inputs=[_metadata(spec) for spec in view.signature.inputs],
        outputs=[_metadata(spec) for spec in view.signature.outputs],
    )


def config_out(model: ModelView, view: VersionView, live: LiveView) -> ModelConfig:
    """The configuration of a ready version."""
    assert view.signature is not None  # the version is ready
    batched = view.batching.enabled and not live.wrong_rows
    skipped = 1 if batched else 0
    return ModelConfig(
        name=model.name,
        platform=_PLATFORMS.get(_runtime(view), _runtime(view)),
        backend=_BACKENDS.get(_runtime(view), _runtime(view)),
        version_policy=VersionPolicy(specific=SpecificVersions(versions=sorted(model.versions))),
        max_batch_size=view.batching.max_rows if batched else 0,
        input=[
            ConfigInput(
                name=spec.name,
                data_type=_data_type(spec),
                # An optional input holds for the whole run and has no rows.
                dims=_shape(spec)[0 if spec.optional else skipped :],
                optional=view.signature.is_optional(spec),
            )
            for spec in view.signature.inputs
        ],
        output=[
            ConfigOutput(name=spec.name, data_type=_data_type(spec), dims=_shape(spec)[skipped:])
            for spec in view.signature.outputs
        ],
        instance_group=_groups(model.name, [instance.device for instance in live.instances]),
        dynamic_batching=DynamicBatching(
            preferred_batch_size=[],
            max_queue_delay_microseconds=round(1000 * view.batching.max_delay_ms),
        )
        if batched
        else None,
    )


def stats_out(view: VersionView, live: LiveView, counted: RequestStats, last_ms: int) -> VersionStats:
    """The statistics of a version; `last_ms` is the last success in ms since 1970, 0 for none."""
    return VersionStats(
        name=view.key.model,
        version=str(view.key.version),
        last_inference=last_ms,
        inference_count=counted.rows,
        execution_count=sum(batch.runs for batch in live.batches),
        inference_stats=InferenceStats(
            success=_duration(counted.successes, counted.success_s),
            fail=_duration(counted.failures, counted.failure_s),
            queue=_duration(counted.successes, counted.queue_s),
            compute_input=_duration(counted.successes, counted.decode_s),
            compute_infer=_duration(counted.successes, counted.compute_s),
            compute_output=_duration(counted.successes, counted.encode_s),
        ),
        batch_stats=[
            BatchStats(
                batch_size=batch.rows,
                compute_input=_duration(0, 0.0),
                compute_infer=_duration(batch.runs, batch.compute_s),
                compute_output=_duration(0, 0.0),
            )
            for batch in sorted(live.batches)
        ],
    )


def index_out(models: Iterable[ModelView], ready_only: bool) -> list[IndexEntry]:
    """Every version of `models`, or only the ready ones."""
    return [
        IndexEntry(
            name=model.name,
            version=str(number),
            state=_INDEX_STATES[view.state],
            reason=view.reason,
        )
        for model in models
        for number, view in sorted(model.versions.items())
        if view.state == "ready" or not ready_only
    ]


_INDEX_STATES: dict[State, Literal["READY", "LOADING", "UNAVAILABLE"]] = {
    "loading": "LOADING",
    "ready": "READY",
    "failed": "UNAVAILABLE",
}


def _runtime(view: VersionView) -> str:
    """The name of the runtime, without its version."""
    return view.backend.partition(" ")[0]


def _shape(spec: TensorSpec) -> list[int]:
    return [ANY] if spec.shape is None else list(spec.shape)


def _datatype(spec: TensorSpec) -> str:
    # An output that is not a tensor is sent as JSON text, one string per element.
    return "BYTES" if spec.datatype == JSON else spec.datatype


def _metadata(spec: TensorSpec) -> Metadata:
    return Metadata(name=spec.name, datatype=_datatype(spec), shape=_shape(spec))


def _data_type(spec: TensorSpec) -> str:
    datatype = _datatype(spec)
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _groups(model: str, devices: list[str]) -> list[InstanceGroup]:
    groups = []
    for number, device in enumerate(dict.fromkeys(devices)):
        kind, _, index = device.partition(":")
        groups.append(
            InstanceGroup(
                name=f"{model}_{number}",
                kind="KIND_CPU" if kind == "cpu" else "KIND_GPU",
                count=devices.count(device),
                gpus=[int(index)] if index else [],
            )
        )
    return groups


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count=count, ns=round(seconds * _NANOSECONDS))
