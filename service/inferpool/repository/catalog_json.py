"""The views of the catalog as JSON values, and back, exactly. They cross from engines to web processes.

Codecs are not sent. Their sources are, with the digests of the files that the codecs are made from; the
contents of the files travel beside the JSON. Numbers that JSON lacks (infinities, NaN) are sent as text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Final, TypeAlias

from inferpool.backends.row_verdict import Evidence
from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.labels import LabelsConfig
from inferpool.codecs.text_config import TextConfig
from inferpool.errors import Verdict
from inferpool.pool.latency_model import Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.ports import VersionKey
from inferpool.pool.row_cost import CostPoint, RowCost
from inferpool.pool.stats import BatchCount, InstanceState
from inferpool.repository.catalog import (
    BatchingView,
    GpuView,
    LiveView,
    ModelView,
    RoundingDifference,
    SampleView,
    VersionView,
)
from inferpool.repository.codec_factory import Codecs, CodecSource
from inferpool.repository.traffic import traffic_from_json
from inferpool.tensors import Signature, TensorSpec

JsonObject: TypeAlias = dict[str, Any]
"""An object as `json` writes and reads it."""

NO_CODECS: Final = Codecs()

_NOT_SENT: Final = ("image", "text", "classes", "engine", "engines")
"""The fields of views that the receiver fills in."""

_UNCHANGED: Final = (str, int, bool, type(None))
"""The types whose values JSON has itself. A scrape sends thousands of them."""


def model_json(model: ModelView, sources: Mapping[VersionKey, CodecSource]) -> JsonObject:
    """A model and its versions; `sources` has the sources of the codecs of the versions that are loaded."""
    return {
        "description": model.description,
        "labels": dict(model.labels),
        "label_fault": model.label_fault,
        "traffic": None if model.traffic is None else model.traffic.to_json(),
        "aliases": model.aliases,
        "versions": {
            str(number): version_json(view, sources.get(view.key)) for number, view in model.versions.items()
        },
    }


def model_from_json(name: str, sent: JsonObject, versions: Mapping[int, VersionView]) -> ModelView:
    """The model that `model_json` wrote, with `versions` in place of those that were sent."""
    return ModelView(
        name,
        sent["description"],
        versions,
        sent["labels"],
        sent["label_fault"],
        traffic_from_json(sent["traffic"]),
        tuple(sent["aliases"]),
    )


def version_json(view: VersionView, source: CodecSource | None = None) -> JsonObject:
    """A version; `source` is that of its codecs."""
    sent: JsonObject = _plain(view)
    sent["codecs"] = None if source is None else source_json(source)
    return sent


def version_from_json(sent: JsonObject, codecs: Codecs = NO_CODECS) -> VersionView:
    """The version that `version_json` wrote, with codecs that were made from its source."""
    gpu = sent["gpu"]
    return VersionView(
        key=VersionKey(*sent["key"]),
        state=sent["state"],
        reason=sent["reason"],
        labels=tuple(sent["labels"]),
        backend=sent["backend"],
        signature=None if sent["signature"] is None else _signature(sent["signature"]),
        batching=_batching(sent["batching"]),
        threads=sent["threads"],
        timeout_s=_optional_number(sent["timeout_s"]),
        image=codecs.image,
        text=codecs.text,
        padding=None if sent["padding"] is None else _padding(sent["padding"]),
        row_cost=None if sent["row_cost"] is None else _row_cost(sent["row_cost"]),
        classes=codecs.classes,
        gpu=None if gpu is None else _gpu(gpu),
        load_s=_number(sent["load_s"]),
        digest=sent["digest"],
        samples=tuple(SampleView(**sample) for sample in sent["samples"]),
        beside=sent["beside"],
        cache_digest=sent["cache_digest"],
        sampling=sent["sampling"],
        drift=sent["drift"],
        sample_rows=sent["sample_rows"],
    )


def source_json(source: CodecSource) -> JsonObject:
    """The source of a version's codecs, with digests in place of the contents of files."""
    return {
        "image": None if source.image is None else _plain(source.image.model_dump(exclude_unset=True)),
        "text": None if source.text is None else _plain(source.text.model_dump(exclude_unset=True)),
        "labels": None if source.labels is None else _plain(source.labels.model_dump(exclude_unset=True)),
        "signature": _plain(source.signature),
        "tokenizer": digest(source.tokenizer),
        "names": digest(source.names),
        "takes_pixels": source.takes_pixels,
    }


def source_from_json(sent: JsonObject, files: Mapping[str, bytes]) -> CodecSource:
    """The source that `source_json` wrote; raises KeyError if a content is not in `files`, by digest."""
    return CodecSource(
        None if sent["image"] is None else ImageConfig.model_validate(sent["image"]),
        None if sent["text"] is None else TextConfig.model_validate(sent["text"]),
        None if sent["labels"] is None else LabelsConfig.model_validate(sent["labels"]),
        _signature(sent["signature"]),
        files[sent["tokenizer"]] if sent["tokenizer"] else b"",
        files[sent["names"]] if sent["names"] else b"",
        sent["takes_pixels"],
    )


def source_files(source: CodecSource) -> dict[str, bytes]:
    """The contents of the files of a source, by digest."""
    return {digest(content): content for content in (source.tokenizer, source.names) if content}


def digest(content: bytes) -> str:
    """SHA-256 of the content of a file in hexadecimal digits; empty for an empty file."""
    return hashlib.sha256(content).hexdigest() if content else ""


def live_json(live: LiveView) -> JsonObject:
    """The facts about a version that change."""
    sent: JsonObject = _plain(live)
    return sent


def live_from_json(sent: JsonObject) -> LiveView:
    """The facts that `live_json` wrote."""
    return LiveView(
        instances=tuple(_instance(instance) for instance in sent["instances"]),
        latency=tuple(Measurement(*map(_number, line)) for line in sent["latency"]),
        waiting_rows=sent["waiting_rows"],
        oldest_age_s=_number(sent["oldest_age_s"]),
        wait_s=_number(sent["wait_s"]),
        batching_stopped=sent["batching_stopped"],
        batches=tuple(BatchCount(*map(_number, line)) for line in sent["batches"]),
        buckets=tuple(sent["buckets"]),
        tensorrt=sent["tensorrt"],
        loading_s=_number(sent["loading_s"]),
        phase=sent["phase"],
    )


def _plain(value: Any) -> Any:
    """Return dataclasses and mappings as objects, tuples as lists; finite numbers and texts unchanged."""
    if type(value) in _UNCHANGED:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in _sent_fields(type(value))}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


@cache
def _sent_fields(view: type[Any]) -> Sequence[str]:
    """The names of the fields of a dataclass that are sent."""
    return [field.name for field in fields(view) if field.name not in _NOT_SENT]


def _number(sent: Any) -> Any:
    return float(sent) if isinstance(sent, str) else sent


def _optional_number(sent: Any) -> Any:
    return None if sent is None else _number(sent)


def _instance(sent: JsonObject) -> InstanceState:
    return InstanceState(sent["device"], sent["state"], _number(sent["run_s"]))


def _signature(sent: JsonObject) -> Signature:
    return Signature(
        tuple(map(_spec, sent["inputs"])), tuple(map(_spec, sent["outputs"])), sent["substitute_input"]
    )


def _spec(sent: JsonObject) -> TensorSpec:
    shape = None if sent["shape"] is None else tuple(sent["shape"])
    return TensorSpec(sent["name"], sent["datatype"], shape, sent["optional"], tuple(sent["symbols"]))


def _batching(sent: JsonObject) -> BatchingView:
    evidence = None if sent["evidence"] is None else Evidence(sent["evidence"])
    delay_ms = _number(sent["max_delay_ms"])
    return BatchingView(sent["enabled"], sent["reason"], sent["max_rows"], delay_ms, sent["remedy"], evidence)


def _padding(sent: JsonObject) -> Padding:
    return Padding(
        fills={name: _number(fill) for name, fill in sent["fills"].items()},
        ids=sent["ids"],
        unit=sent["unit"],
        longest=sent["longest"],
        proven=sent["proven"],
        axes={name: tuple(axes) for name, axes in sent["axes"].items()},
        reason=sent["reason"],
        mask=sent["mask"],
        rounded=sent["rounded"],
    )


def _row_cost(sent: JsonObject) -> RowCost:
    points = tuple(CostPoint(*map(_number, point)) for point in sent["points"])
    return RowCost(points, _number(sent["least"]))


def _gpu(sent: JsonObject) -> GpuView:
    difference = sent["difference"]
    return GpuView(
        cpu_nodes=sent["cpu_nodes"],
        padding=sent["padding"],
        precision=sent["precision"],
        difference=None
        if difference is None
        else RoundingDifference(**{name: _number(item) for name, item in difference.items()}),
        graphs=Verdict(*sent["graphs"]),
        pixels=sent["pixels"],
    )
