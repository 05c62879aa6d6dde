"""The web side's view of the repository: models, versions and their states, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, get_args

from inferpool.backends.row_verdict import Evidence
from inferpool.codecs.labels import LabelsCodec
from inferpool.codecs.text import TextCodec
from inferpool.errors import ModelNotFound, NotReady, Reason, Verdict, VersionNotFound
from inferpool.pool.latency_model import Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.ports import VersionKey
from inferpool.pool.row_cost import RowCost
from inferpool.pool.stats import BatchCount, InstanceState
from inferpool.repository.layout import is_version_number
from inferpool.repository.traffic import Traffic
from inferpool.tensors import Signature, names_text

if TYPE_CHECKING:
    from inferpool.codecs.image import ImageCodec

State: TypeAlias = Literal["loading", "ready", "draining", "unloaded", "failed"]
"""The state of a version."""

LOADING: Final[State] = "loading"
READY: Final[State] = "ready"
DRAINING: Final[State] = "draining"
UNLOADED: Final[State] = "unloaded"
FAILED: Final[State] = "failed"

STATES: Final[tuple[State, ...]] = get_args(State)


@dataclass(frozen=True, slots=True)
class BatchingView:
    """Whether rows of several requests run together.

    Attributes:
        enabled: whether they do; `reason` says why, or why not.
        max_rows: the most rows of a batch.
        max_delay_ms: how long a batch waits for more rows.
        remedy: what to change so that they do; None if they do.
        evidence: what shows that rows may share a run; None if `enabled` is not set.
    """

    enabled: bool = False
    reason: str = ""
    max_rows: int = 1
    max_delay_ms: float = 0.0
    remedy: Reason | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True)
class RoundingDifference:
    """The largest differences that coarser rounding makes.

    Attributes:
        absolute: between two numbers of an output.
        relative: the same as a share of the output's scale.
        changed: the share of integers, flags and texts that are not the same.
        rows: how many rows were tried.
    """

    absolute: float
    relative: float
    changed: float
    rows: int


@dataclass(frozen=True, slots=True)
class GpuView:
    """How a version runs on GPUs.

    Attributes:
        cpu_nodes: how many nodes of each kind run on the CPU all the same.
        padding: whether batches are rounded up to the measured sizes, and why, or why not.
        precision: how numbers are rounded, and the change that this makes.
        difference: the same in figures; None without coarser rounding, or if it could not be measured.
        graphs: whether every instance replays its runs from CUDA graphs, or why not.
        pixels: where pixels are normalised, and why not on a GPU; None if the model takes no pictures.
    """

    cpu_nodes: Mapping[str, int]
    padding: str
    precision: str
    difference: RoundingDifference | None
    graphs: Verdict
    pixels: str | None = None


@dataclass(frozen=True, slots=True)
class SampleView:
    """A golden sample to try a version with: the name of its file, and its inputs as JSON."""

    name: str
    inputs: str


@dataclass(frozen=True, slots=True)
class VersionView:
    """One version: its state, and the facts about it that requests depend on.

    Attributes:
        key: model name and version number.
        state: one of `STATES`; `reason` says why it failed.
        labels: the labels that name this version.
        signature: its inputs and outputs; None until they are known.
        timeout_s: the timeout of a request that has none; None sets no timeout.
        image: turns pictures into tensors; None if the model takes none.
        text: turns sentences into tensors; None if the model takes none.
        padding: how rows of different lengths share batches; None if all rows have one length.
        row_cost: what a row costs by its elements; None if all rows cost the same, or are texts.
        classes: turns outputs into predictions; None if the model has no labels.
        gpu: how the version runs on GPUs; None on the CPU.
        load_s: the seconds that loading took.
        sample_rows: rows of the golden samples by input, as nested lists; empty if they are too large.
        digest: the digest of the files of the model, as `LoadFiles.digest` tells it; "" until they are read.
        samples: golden samples that are small enough to be shown.
        beside: whether it loads although the server is ready already, which stays ready meanwhile.
        cache_digest: stands for all that its outputs depend on beside the inputs; None if its answers are not
            cached.
        sampling: the table `[samples]` of `model.toml`; empty if no samples are kept.
        drift: the `profile` of the version and the table `[drift]` as `config`; empty without a profile.
    """

    key: VersionKey
    state: State
    reason: str = ""
    labels: tuple[str, ...] = ()
    backend: str = ""
    signature: Signature | None = None
    batching: BatchingView = BatchingView()
    threads: int = 0
    timeout_s: float | None = None
    image: ImageCodec | None = None
    text: TextCodec | None = None
    padding: Padding | None = None
    row_cost: RowCost | None = None
    classes: LabelsCodec | None = None
    gpu: GpuView | None = None
    load_s: float = 0.0
    digest: str = ""
    samples: tuple[SampleView, ...] = ()
    beside: bool = False
    cache_digest: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict, compare=False)
    drift: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sample_rows: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ModelView:
    """A model.

    Attributes:
        name: the name in requests.
        description: what `model.toml` says about it.
        versions: its versions by number.
        labels: the number of the version that each label names.
        label_fault: which labels name a version that is not served; None if all labels are good.
        traffic: how requests are shared out beside the labels; None if the default version answers all.
        aliases: other names in requests.
    """

    name: str
    description: str
    versions: Mapping[int, VersionView]
    labels: Mapping[str, int]
    label_fault: Reason | None = None
    traffic: Traffic | None = None
    aliases: tuple[str, ...] = ()

    @cached_property
    def default(self) -> VersionView | None:
        """The version labelled `stable` if it is ready, else the newest ready version; None without one."""
        stable = self.versions.get(self.labels.get("stable", 0))
        if stable is not None and stable.state == READY:
            return stable
        ready = [version for version in self.versions.values() if version.state == READY]
        return max(ready, key=lambda view: view.key.version, default=None)

    def version(self, version: str) -> VersionView:
        """The version of this number or label; raises VersionNotFound."""
        number = self.labels.get(version)
        if number is None and is_version_number(version):
            number = int(version)
        view = self.versions.get(number) if number is not None else None
        if view is None:
            have = names_text([*map(str, self.versions), *self.labels])
            raise VersionNotFound(f'"{self.name}" has no version "{version[:100]}"; there are {have}')
        return view


@dataclass(frozen=True, slots=True)
class EngineView:
    """The engine that runs a version.

    Attributes:
        name: the device, or the version that has the engine for itself.
        pid: the id of its process; 0 while it is being started.
        restarts: how many engines it has replaced since the server started.
    """

    name: str
    pid: int
    restarts: int


@dataclass(frozen=True, slots=True)
class LiveView:
    """The facts about a version that change while it serves.

    Attributes:
        instances: each with its device and state.
        latency: measured seconds by batch size.
        waiting_rows: rows in the queue.
        oldest_age_s: seconds that the oldest entry has waited.
        wait_s: seconds of work that wait, by the measured rate.
        batching_stopped: why batching was turned off while serving; None if it was not.
        batches: how many batches of each size have run.
        buckets: the sizes that batches are rounded up to on GPUs; empty on the CPU.
        tensorrt: the state of the upgrade to TensorRT; None if none was asked for.
        loading_s: for how many seconds it has been loading; 0 once it is loaded.
        engine: the engine that runs it; None in the server's own process.
        engines: all engines that run it, or did when they were restarted; one for each device.
        missing: those that cannot run it at the moment, or could not load it, while it is ready.
        phase: what a load of it does at the moment, also one beside a version that serves; None without one.
    """

    instances: Sequence[InstanceState] = ()
    latency: Sequence[Measurement] = ()
    waiting_rows: int = 0
    oldest_age_s: float = 0.0
    wait_s: float = 0.0
    batching_stopped: Reason | None = None
    batches: Sequence[BatchCount] = ()
    buckets: Sequence[int] = ()
    tensorrt: str | None = None
    loading_s: float = 0.0
    engine: EngineView | None = None
    engines: Sequence[EngineView] = ()
    missing: Sequence[str] = ()
    phase: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the server can answer, and the problems there are.

    Attributes:
        ready: whether every required model can answer.
        status: `ok`, `degraded` (ready, with problems), `loading`, `draining` or `unavailable`.
        problems: a sentence for each `model/version` (or `model`, or `server`) with a problem.
    """

    ready: bool
    status: str
    problems: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Catalog(Protocol):
    """The read-only view of what is served."""

    def models(self) -> Mapping[str, ModelView]:
        """Every model by name, as it is at this moment; the mapping does not change."""

    def live(self, key: VersionKey) -> LiveView:
        """The facts about a version that change; empty if it is not loaded."""

    def health(self) -> Health:
        """Whether the server can answer."""

    async def refresh(self) -> None:
        """Bring what `live` and `health` tell up to date; called first, and never takes a second."""


def known_models(catalog: Catalog) -> Mapping[str, ModelView]:
    """Every model by name; raises NotReady if none is known yet, because the first engine still starts."""
    models = catalog.models()
    if not models:
        raise NotReady("the server is starting, and does not know its models yet")
    return models


def find_model(catalog: Catalog, name: str) -> ModelView:
    """The model of this name or alias.

    Raises ModelNotFound, which lists the models there are, or NotReady if none is known yet.
    """
    models = known_models(catalog)
    model = models.get(name)
    if model is None:
        model = next((each for each in models.values() if name in each.aliases), None)
    if model is None:
        raise ModelNotFound(f'no model is called "{name[:100]}"; there are {names_text(models)}')
    return model


def find_ready(catalog: Catalog, name: str, version: str | None) -> VersionView:
    """The version that a request asks for by number or label; without either, the model's default.

    Raises ModelNotFound, VersionNotFound, or NotReady if the version cannot answer.
    """
    model = find_model(catalog, name)
    if version is None:
        default = model.default
        if default is None:
            states = ", ".join(sorted({view.state for view in model.versions.values()}))
            raise NotReady(f'no version of "{name}" is ready: {states}; /models/{name} says why')
        return default
    view = model.version(version)
    if view.state != READY:
        raise NotReady(f'version {view.key.version} of "{name}" is {view.state}')
    return view
