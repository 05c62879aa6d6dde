"""The views of models and versions that readers see; each change is published as a new mapping.

Readers therefore see a consistent state without a lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from inferpool.errors import Reason
from inferpool.pool.ports import VersionKey
from inferpool.repository import lifecycle as lifecycle_rules
from inferpool.repository.catalog import (
    DRAINING,
    FAILED,
    LOADING,
    READY,
    UNLOADED,
    ModelView,
    VersionView,
)
from inferpool.repository.declared_model import DeclaredModel, label_fault
from inferpool.repository.lifecycle import VersionLifecycle
from inferpool.repository.traffic import Traffic
from inferpool.repository.version_source import VersionSource

log = logging.getLogger(__name__)

MOST_DEFAULTS: Final = 10
"""How many earlier default versions of a model are remembered for a rollback."""


class PublishedViews:
    """What readers see of the models that this process serves.

    Attributes:
        lock: held while a view changes; reentrant.
        models: every model by name; the mapping does not change.
        elsewhere: the devices of the versions that run on others only. Such versions are not shown.
        was_ready: whether everything has been ready once, so that later loads run beside what serves.
    """

    def __init__(
        self,
        declared: Mapping[str, DeclaredModel],
        traffic: Mapping[str, Traffic | None],
        on_change: Callable[[], None] | None,
        until_seen: Callable[[], None] | None,
    ) -> None:
        """Show nothing yet.

        Args:
            declared: what the folder says of each model, whenever that is looked up.
            traffic: how the requests for models are shared out, whenever that is looked up.
            on_change: called after every change.
            until_seen: waits until all that send requests know of the last change; None if they look before
                each request.
        """
        self.lock = threading.RLock()
        self.models: Mapping[str, ModelView] = MappingProxyType({})
        self.elsewhere: dict[VersionKey, Sequence[str]] = {}
        self.was_ready = False
        self._declared = declared
        self._traffic = traffic
        self._on_change = on_change
        self._until_seen = until_seen
        # Versions that have vanished from the folder, or newer ones serve in their place.
        self._vanishing: set[VersionKey] = set()
        self._removed: set[VersionKey] = set()
        self._defaults: dict[str, list[int]] = {}

    def begin(self, name: str, sources: Mapping[int, VersionSource | Reason]) -> None:
        """Show a model before any of its versions is loaded, without a call of `on_change`."""
        model = self._model_view(self._declared[name], {})
        if model.label_fault is not None:
            log.warning("%s", model.label_fault)
        versions = {}
        for version, source in sources.items():
            state, reason = (FAILED, source) if isinstance(source, str) else (LOADING, "")
            key = VersionKey(name, version)
            versions[version] = VersionView(key, state, reason, _names(model.labels, version))
        if versions:
            self.models = MappingProxyType({**self.models, name: replace(model, versions=versions)})

    # What a version is.

    def show(self, key: VersionKey, lifecycle: VersionLifecycle) -> bool:
        """Publish what a version is now; returns whether it has vanished for good."""
        with self.lock:
            model = self.models.get(key.model)
            before = None if model is None else model.versions.get(key.version)
            if lifecycle.actual == lifecycle_rules.READY:
                if before is not None and before.state == READY and lifecycle.reason:
                    self.publish(replace(before, reason=f"a newer load has failed: {lifecycle.reason}"))
            elif lifecycle.actual == lifecycle_rules.DRAINING:
                if before is not None:
                    self.publish(replace(before, state=DRAINING))
            elif lifecycle.loading is not None:
                self.publish(VersionView(key, LOADING, beside=self.was_ready))
            elif key in self._vanishing:
                self._vanishing.discard(key)
                self.elsewhere.pop(key, None)
                self._remove(key)
                return True
            elif lifecycle.actual == lifecycle_rules.FAILED and key in self.elsewhere:
                self._remove(key, gone=False)
            elif lifecycle.actual == lifecycle_rules.FAILED:
                self.publish(VersionView(key, FAILED, lifecycle.reason))
            else:
                self.publish(VersionView(key, UNLOADED, "it was unloaded, or its load was cancelled"))
            return False

    def leave(self, key: VersionKey) -> None:
        """Show a version no longer that the engine of another device shows."""
        with self.lock:
            self._remove(key, gone=False)
            if self._on_change is not None:
                self._on_change()  # the other engine may have to be started

    def is_elsewhere(self, key: VersionKey) -> bool:
        """Whether the last load has left a version to the engine of another device."""
        return key in self.elsewhere

    def vanish(self, key: VersionKey) -> None:
        """Show a version no longer once it is unloaded."""
        self._vanishing.add(key)

    def stay(self, key: VersionKey) -> None:
        """Show a version even when it is unloaded."""
        self._vanishing.discard(key)

    def removed(self) -> list[VersionKey]:
        """The versions that were shown once, and are no longer."""
        return sorted(self._removed)

    def publish(self, view: VersionView) -> None:
        """Show a version, with the labels that name it."""
        key = view.key
        with self.lock:
            model = self.models.get(key.model) or self._model_view(self._declared[key.model], {})
            view = replace(view, labels=_names(model.labels, key.version))
            if _same(model.versions.get(key.version), view):
                return
            self._removed.discard(key)
            self._set_model(
                replace(model, versions=dict(sorted({**model.versions, key.version: view}.items())))
            )

    def _remove(self, key: VersionKey, *, gone: bool = True) -> None:
        """Show a version no longer, and its model neither if that was the last version.

        Unless it is `gone`, another engine shows it.
        """
        with self.lock:
            model = self.models.get(key.model)
            if model is None or key.version not in model.versions:
                return
            if gone:
                self._removed.add(key)
            versions = {number: view for number, view in model.versions.items() if number != key.version}
            self._set_model(replace(model, versions=versions))
            self.publish_model(key.model)  # a label may have named the version

    # What a model is.

    def publish_model(self, name: str) -> None:
        """Show what is known of a model beside its versions: `model.toml`, labels and traffic."""
        with self.lock:
            before = self.models.get(name)
            if before is None:
                return
            model = self._model_view(self._declared[name], before.versions)
            if (model.description, model.labels, model.label_fault, model.traffic) != (
                before.description, before.labels, before.label_fault, before.traffic,
            ):  # fmt: skip
                versions = {
                    number: view if view.labels == (names := _names(model.labels, number))
                    else replace(view, labels=names)
                    for number, view in before.versions.items()
                }  # fmt: skip
                self._set_model(replace(model, versions=versions))

    def _set_model(self, model: ModelView) -> None:
        """Publish a model; the caller holds the lock."""
        before = self.models.get(model.name)
        default = None if before is None else before.default
        models = {name: view for name, view in self.models.items() if name != model.name or model.versions}
        if model.versions:
            models[model.name] = model
        if default is not None and model.default is not None and model.default.key != default.key:
            defaults = self._defaults.setdefault(model.name, [])
            defaults.append(default.key.version)
            del defaults[:-MOST_DEFAULTS]
            log.info("%s: version %d answers in place of %d", *model.default.key, default.key.version)
        self.models = MappingProxyType(models)
        if self._on_change is not None:
            self._on_change()

    def _model_view(self, declared: DeclaredModel, versions: Mapping[int, VersionView]) -> ModelView:
        """A model as the folder has it, with these versions."""
        name, shown = declared.folder.name, {*declared.served, *versions}
        labels = {label: version for label, version in declared.labels().items() if version in shown}
        fault = label_fault(name, declared, sorted(shown)) or (declared.fault if versions else None)
        config, aliases = declared.config, declared.folder.aliases
        return ModelView(name, config.description, versions, labels, fault, self._traffic.get(name), aliases)

    def earlier_defaults(self, model: str) -> Sequence[int]:
        """The versions that have answered by default before the present one, oldest first."""
        return list(self._defaults.get(model, ()))

    def set_earlier_defaults(self, model: str, versions: Collection[int]) -> None:
        """Remember `versions` in place of `earlier_defaults`."""
        self._defaults[model] = list(versions)

    # Who reads.

    def jobs_changed(self) -> None:
        """Publish the jobs."""
        if self._on_change is not None:
            self._on_change()

    def await_seen(self) -> None:
        """Wait until all that send requests know what is published now."""
        if self._until_seen is not None:
            self._until_seen()


def _same(one: VersionView | None, other: VersionView) -> bool:
    """Whether two views of a version that is not ready, or of one load, are the same."""
    return one is not None and other.signature is one.signature and (one.state, one.reason, one.labels) == (
        other.state, other.reason, other.labels,
    )  # fmt: skip


def _names(labels: Mapping[str, int], version: int) -> tuple[str, ...]:
    """The labels that name a version."""
    return tuple(label for label, labelled in labels.items() if labelled == version)
