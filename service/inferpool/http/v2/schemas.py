"""The bodies of the `/v2` routes except infer: those of the protocol and of Triton's extensions.

Sources: the protocol's REST page for metadata and health; Triton's pages on the model configuration,
statistics and model repository extensions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inferpool import __version__
from inferpool.http.body_model import BodyModel

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


class Error(BodyModel):
    """An error of `/v2`. Clients match `code`, which is stable."""

    error: str
    code: str


class Server(BodyModel):
    """The server and the protocol extensions that it has."""

    name: str = "inferpool"
    version: str = __version__
    extensions: list[str] = Field(default=list(EXTENSIONS))


class Live(BodyModel):
    """Whether the process answers: it does if this arrives."""

    live: bool = True


class Ready(BodyModel):
    """Whether every required model can answer; if not, `error` has the reason."""

    ready: bool
    error: str | None = None
    code: str | None = None


class ModelReady(BodyModel):
    """Whether the model can answer; otherwise the response is an error."""

    name: str
    ready: bool = True


class ModelNames(BodyModel):
    """The names of the models in the repository."""

    models: list[str]


class Metadata(BodyModel):
    """An input or output: -1 is a dimension of any size; the shape is `[-1]` if the rank is open."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BodyModel):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Metadata]
    outputs: list[Metadata]


class ConfigInput(BodyModel):
    """An input; if requests are batched, `dims` leaves out the rows."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool


class ConfigOutput(BodyModel):
    """An output; if requests are batched, `dims` leaves out the rows."""

    name: str
    data_type: str
    dims: list[int]


class InstanceGroup(BodyModel):
    """The instances on one device."""

    name: str
    kind: Literal["KIND_CPU", "KIND_GPU"]
    count: int
    gpus: list[int]


class SpecificVersions(BodyModel):
    """The versions that are served, by number."""

    versions: list[int]


class VersionPolicy(BodyModel):
    """Which versions are served."""

    specific: SpecificVersions


class DynamicBatching(BodyModel):
    """How rows of several requests are gathered; without preferred sizes all are equally good."""

    preferred_batch_size: list[int]
    max_queue_delay_microseconds: int


class ModelConfig(BodyModel):
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


class Duration(BodyModel):
    """A count and the total duration; both are 0 if the step is not measured."""

    count: int
    ns: int


class InferenceStats(BodyModel):
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


class BatchStats(BodyModel):
    """Batches of one size; gathering and scattering are measured per request only."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class VersionStats(BodyModel):
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


class Statistics(BodyModel):
    """The statistics of several versions."""

    model_stats: list[VersionStats]


class IndexEntry(BodyModel):
    """A version in the repository, with its state."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str


class IndexQuery(BodyModel):
    """Which versions to list."""

    ready: bool = Field(False, description="List only versions that can answer.")
