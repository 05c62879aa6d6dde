"""What is served, as plain values: the view that the web side has of the repository."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal, Protocol, TypeAlias, get_args

from inferpool.codecs.image import ImageCodec
from inferpool.codecs.labels import LabelsCodec
from inferpool.codecs.text import TextCodec
from inferpool.errors import ModelNotFound, NotReady, VersionNotFound
from inferpool.pool.latency_model import Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.pool import InstanceState
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import BatchCount
from inferpool.repository.load.gpu.precision import Difference
from inferpool.tensors import Signature, names_text

State: TypeAlias = Literal["loading", "ready", "failed"]
"""The state of a version."""

LOADING: Final[State] = "loading"
READY: Final[State] = "ready"
FAILED: Final[State] = "failed"
_NUMBER: Final = re.compile("[1-9][0-9]{0,17}")

STATES: Final[tuple[State, ...]] = get_args(State)


@dataclass(frozen=True, slots=True)
class BatchingView:
    """Whether rows of several requests run together, why, and how many at the most."""

    enabled: bool = False
    reason: str = ""
    max_rows: int = 1
    max_delay_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuView:
    """How a version runs on GPUs.

    Attributes:
        cpu_nodes: how many nodes of each kind run on the CPU all the same.
        padding: whether batches are rounded up to the measured sizes, and why, or why not.
        precision: how numbers are rounded, and what that changes.
        difference: the same in figures; None where the model is as it says, or it could not be measured.
        graphs: whether every instance replays its runs from CUDA graphs, or why not.
        pixels: where those of pictures are normalised, and why not on a GPU; None where none are.
    """

    cpu_nodes: Mapping[str, int]
    padding: str
    precision: str
    difference: Difference | None
    graphs: bool | str
    pixels: str | None = None


@dataclass(frozen=True, slots=True)
class VersionView:
    """One version: its state, and what a request needs to know of it.

    Attributes:
        key: model name and version number.
        state: one of `STATES`; `reason` says why it failed.
        labels: names of this version.
        signature: None until it is known.
        timeout_s: the timeout of a request that gives none, or None.
        image: turns pictures into tensors, where the model takes them.
        text: turns sentences into tensors, where the model takes them.
        padding: how rows of different lengths share batches, where the model has such.
        classes: turns outputs into predictions, where the model has labels.
        gpu: how it runs on GPUs, where it does.
        load_s: what loading took, in seconds.
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
    classes: LabelsCodec | None = None
    gpu: GpuView | None = None
    load_s: float = 0.0


@dataclass(frozen=True)
class ModelView:
    """A model: its versions by number, its labels, and the version that requests mean by default."""

    name: str
    description: str
    versions: Mapping[int, VersionView]
    labels: Mapping[str, int]

    @cached_property
    def default(self) -> VersionView | None:
        """The version labelled `stable` if it is ready, else the newest that is; None if none is."""
        stable = self.versions.get(self.labels.get("stable", 0))
        if stable is not None and stable.state == READY:
            return stable
        ready = [version for version in self.versions.values() if version.state == READY]
        return max(ready, key=lambda view: view.key.version, default=None)

    def version(self, version: str) -> VersionView:
        """The version of this number or label; raises VersionNotFound."""
        number = self.labels.get(version)
        if number is None and _NUMBER.fullmatch(version):
            number = int(version)
        view = self.versions.get(number) if number is not None else None
        if view is None:
            have = names_text([*map(str, self.versions), *self.labels])
            raise VersionNotFound(f'"{self.name}" has no version "{version[:100]}"; there are {have}')
        return view


@dataclass(frozen=True, slots=True)
class LiveView:
    """What changes while a version serves.

    Attributes:
        instances: each with its device and state.
        latency: measured seconds by batch size.
        waiting_rows: rows in the queue.
        oldest_age_s: seconds that the entry which came first has waited.
        wait_s: seconds of work that wait, by the measured rate.
        wrong_rows: what an output had instead of a batch's rows, if that turned batching off.
        batches: how many batches of each size have run.
        rungs: the sizes that batches are rounded up to on GPUs; empty where none are.
        tensorrt: what has become of the wish for TensorRT; None where it was not wished for.
        loading_s: for how long it has been loading so far, while it does.
    """

    instances: Sequence[InstanceState] = ()
    latency: Sequence[Measurement] = ()
    waiting_rows: int = 0
    oldest_age_s: float = 0.0
    wait_s: float = 0.0
    wrong_rows: str = ""
    batches: Sequence[BatchCount] = ()
    rungs: Sequence[int] = ()
    tensorrt: str | None = None
    loading_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the server can answer, and what is wrong with what.

    Attributes:
        ready: every required model can answer.
        status: `ok`, `degraded` (ready, with problems), `loading`, `draining` or `unavailable`.
        problems: a sentence for each `model/version` (or `model`, or `server`) that has one.
    """

    ready: bool
    status: str
    problems: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Catalog(Protocol):
    """The read-only view of what is served."""

    def models(self) -> Mapping[str, ModelView]:
        """Every model by name, as it is at this moment; the mapping does not change."""

    def live(self, key: VersionKey) -> LiveView:
        """The changing facts of a version; empty ones if it is not loaded."""

    def health(self) -> Health:
        """Whether the server can answer."""


def find_model(catalog: Catalog, name: str) -> ModelView:
    """The model of this name; raises ModelNotFound."""
    models = catalog.models()
    model = models.get(name)
    if model is None:
        raise ModelNotFound(f'no model is called "{name[:100]}"; there are {names_text(models)}')
    return model


def find_ready(catalog: Catalog, name: str, version: str | None) -> VersionView:
    """The version that a request means: by number, by label, or the model's default.

    Raises ModelNotFound, VersionNotFound, or NotReady if it cannot answer.
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
