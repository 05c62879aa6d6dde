"""Describes models and versions in the terms of the protocol and of Triton's extensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from inferpool.http.predict.request_metrics import RequestTotals
from inferpool.http.v2.schemas import (
    BatchStats,
    ConfigInput,
    ConfigOutput,
    Duration,
    DynamicBatching,
    IndexEntry,
    InferenceStats,
    InstanceGroup,
    Metadata,
    ModelConfig,
    ModelMetadata,
    SpecificVersions,
    VersionPolicy,
    VersionStats,
)
from inferpool.pool.stats import BatchCount
from inferpool.repository.catalog import LiveView, ModelView, State, VersionView
from inferpool.tensors import ANY, JSON, TensorSpec

_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "torch": "pytorch_libtorch"}
_BACKENDS = {"torch": "pytorch"}
_NANOSECONDS = 1_000_000_000


def metadata_out(model: ModelView, view: VersionView) -> ModelMetadata:
    """Return the metadata of a ready version."""
    assert view.signature is not None  # the version is ready
    return ModelMetadata(
        name=model.name,
        versions=[str(number) for number in sorted(model.versions)],
        platform=_PLATFORMS.get(_runtime(view), _runtime(view)),
        inputs=[_metadata(spec) for spec in view.signature.inputs],
        outputs=[_metadata(spec) for spec in view.signature.outputs],
    )


def config_out(model: ModelView, view: VersionView, live: LiveView) -> ModelConfig:
    """Return the configuration of a ready version."""
    assert view.signature is not None  # the version is ready
    batched = view.batching.enabled and not live.batching_stopped
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


def stats_out(
    view: VersionView, batches: Sequence[BatchCount], counted: RequestTotals, last_ms: int
) -> VersionStats:
    """Return the statistics of a version; `last_ms` is the last success in ms since 1970, 0 for none."""
    return VersionStats(
        name=view.key.model,
        version=str(view.key.version),
        last_inference=last_ms,
        inference_count=counted.rows,
        execution_count=sum(batch.runs for batch in batches),
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
            for batch in batches
        ],
    )


def index_out(models: Iterable[ModelView], ready_only: bool) -> list[IndexEntry]:
    """List every version of `models`, or only the ready ones."""
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


_INDEX_STATES: dict[State, Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]] = {
    "loading": "LOADING",
    "ready": "READY",
    "draining": "UNLOADING",
    "unloaded": "UNAVAILABLE",
    "failed": "UNAVAILABLE",
}


def _runtime(view: VersionView) -> str:
    """Return the name of the runtime, without its version."""
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
