"""The bodies of `/v2` beside `infer`: the Open Inference Protocol's, and those of Triton's extensions to it.

Sources: the protocol's REST page for metadata and health, and Triton's pages on the model configuration,
statistics and model repository extensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, Field

from inferpool import __version__
from inferpool.http.predict.served_version import RequestStats
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
"""What `/v2` has of Triton's extensions, by the names that Triton gives them."""

_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "torch": "pytorch_libtorch"}
_BACKENDS = {"torch": "pytorch"}
_NANOSECONDS = 1_000_000_000


class Error(BaseModel):
    """An error of `/v2`; `code` is the stable word to match on."""

    error: str
    code: str


class Server(BaseModel):
    """What serves, and which extensions of the protocol it has."""

    name: str = "inferpool"
    version: str = __version__
    extensions: list[str] = list(EXTENSIONS)


class Live(BaseModel):
    """The process answers."""

    live: bool = True


class Ready(BaseModel):
    """Whether every required model can answer; what is in the way where not."""

    ready: bool
    error: str | None = None
    code: str | None = None


class ModelReady(BaseModel):
    """The model can answer."""

    name: str
    ready: bool = True


class ModelNames(BaseModel):
    """Everything in the repository."""

    models: list[str]


class Metadata(BaseModel):
    """An input or output: -1 is a dimension of any size, `[-1]` the shape where the rank is left open."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Metadata]
    outputs: list[Metadata]


class ConfigInput(BaseModel):
    """An input, without its rows where requests are batched."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool


class ConfigOutput(BaseModel):
    """An output, without its rows where requests are batched."""

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
    """How rows of several requests are gathered; without a preferred size every one is as good."""

    preferred_batch_size: list[int]
    max_queue_delay_microseconds: int


class ModelConfig(BaseModel):
    """A model's configuration as Triton words it; `max_batch_size` 0 is a model that is not batched."""

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
    """How often something was done, and how long it took in all; 0 and 0 where it is not measured."""

    count: int
    ns: int


class InferenceStats(BaseModel):
    """Requests by how they ended, and where the time of those that succeeded went.

    `compute_input` is reading and checking the tensors of a request, `compute_infer` the runs of the batches
    that it was in, `compute_output` writing its answer.
    """

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class BatchStats(BaseModel):
    """Batches of one size; what gathers and scatters them is not measured apart from their requests."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class VersionStats(BaseModel):
    """What a version has done since the server started.

    `last_inference` is a moment in milliseconds since 1970, 0 where there is none; `inference_count` counts
    rows, `execution_count` batches.
    """

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class Statistics(BaseModel):
    """What was done by version."""

    model_stats: list[VersionStats]


class IndexEntry(BaseModel):
    """A version in the repository."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class IndexQuery(BaseModel):
    """Which versions to list."""

    ready: bool = Field(False, description="List only those that can answer.")


def metadata_out(model: ModelView, view: VersionView) -> ModelMetadata:
    """What a version takes and gives."""
    assert view.signature is not None  # the version is ready
    return ModelMetadata(
        name=model.name,
        versions=[str(number) for number in sorted(model.versions)],
        platform=_PLATFORMS.get(_runtime(view), _runtime(view)),
        inputs=[_metadata(spec) for spec in view.signature.inputs],
        outputs=[_metadata(spec) for spec in view.signature.outputs],
    )


def config_out(model: ModelView, view: VersionView, live: LiveView) -> ModelConfig:
    """A version's configuration."""
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
                # An optional input is one for the whole run, and has no rows.
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


def stats_out(view: VersionView, live: LiveView, tally: RequestStats, last_ms: int) -> VersionStats:
    """What a version has done; `last_ms` is the moment of the last success since 1970, 0 for none."""
    return VersionStats(
        name=view.key.model,
        version=str(view.key.version),
        last_inference=last_ms,
        inference_count=tally.rows,
        execution_count=sum(batch.runs for batch in live.batches),
        inference_stats=InferenceStats(
            success=_duration(tally.successes, tally.success_s),
            fail=_duration(tally.failures, tally.failure_s),
            queue=_duration(tally.successes, tally.queue_s),
            compute_input=_duration(tally.successes, tally.decode_s),
            compute_infer=_duration(tally.successes, tally.compute_s),
            compute_output=_duration(tally.successes, tally.encode_s),
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
    """Every version in the repository, or those that can answer."""
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
    """The runtime's name, of its name and version."""
    return view.backend.partition(" ")[0]


def _shape(spec: TensorSpec) -> list[int]:
    return [ANY] if spec.shape is None else list(spec.shape)


def _datatype(spec: TensorSpec) -> str:
    # What is no tensor goes out as its JSON text, a string for each of its elements.
    return "BYTES" if spec.datatype == JSON else spec.datatype


def _metadata(spec: TensorSpec) -> Metadata:
    return Metadata(name=spec.name, datatype=_datatype(spec), shape=_shape(spec))


def _data_type(spec: TensorSpec) -> str:
    datatype = _datatype(spec)
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _groups(model: str, devices: list[str]) -> list[InstanceGroup]:
    groups = []
    for number, device in enumerate(dict.fromkeys(devices)):
        kind, _, place = device.partition(":")
        groups.append(
            InstanceGroup(
                name=f"{model}_{number}",
                kind="KIND_CPU" if kind == "cpu" else "KIND_GPU",
                count=devices.count(device),
                gpus=[int(place)] if place else [],
            )
        )
    return groups


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count=count, ns=round(seconds * _NANOSECONDS))
