"""Which versions are to be served: from what the folder holds, and from what administrators asked for.

The manager is told whenever that changes.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from inferpool.errors import ConfigError, ModelNotFound, Reason, VersionNotFound
from inferpool.pool.ports import VersionKey
from inferpool.repository import lifecycle as lifecycle_rules
from inferpool.repository.declared_model import config_stamp
from inferpool.repository.folder_contents import FolderContents
from inferpool.repository.layout import ModelFolder
from inferpool.repository.load_manager import LoadManager
from inferpool.repository.published_views import PublishedViews
from inferpool.repository.settled_sources import SettledSources
from inferpool.repository.version_filter import VersionFilter
from inferpool.repository.version_source import VersionSource
from inferpool.tensors import names_text


class WantedVersions:
    """What is to be served, as the manager was told last.

    Attributes:
        lock: held while anything changes that decides about what is to be served; reentrant.
    """

    def __init__(
        self,
        contents: FolderContents,
        versions: VersionFilter,
        views: PublishedViews,
        manager: LoadManager,
        keep_warm_s: float,
    ) -> None:
        """Want nothing yet.

        Args:
            versions: the versions that this process may serve.
            keep_warm_s: how long a version goes on serving after a newer one has taken its place.
        """
        self.lock = threading.RLock()
        self._contents = contents
        self._versions = versions
        self._views = views
        self._manager = manager
        self._keep_warm_s = keep_warm_s
        # Versions that somebody has unloaded, and those that somebody has loaded although model.toml serves
        # them not.
        self._unloaded: set[VersionKey] = set()
        self._asked_for: set[VersionKey] = set()
        # What the manager was told to load versions from.
        self._sources: dict[VersionKey, VersionSource | Reason] = {}

    def rescan(self, model: str | None = None, settled: SettledSources | None = None) -> bool:
        """Look at the folder again: new and changed versions are loaded, deleted ones drained.

        Only at one model if `model` names one. With `settled`, files that are still being copied wait; the
        result is then whether there are any.
        """
        contents = self._contents
        with self.lock:
            try:
                folders = contents.look()
            except (ConfigError, OSError) as error:
                # A volume that is not mounted for a moment must not unload everything.
                contents.tell(f"{contents.path} is not looked at again, and what is loaded goes on: {error}")
                return False
            found = {folder.name: folder for folder in folders}
            for name in contents.declared:
                found.setdefault(name, ModelFolder(name, None))
            waits = False
            for name, folder in found.items():
                if model not in (None, name):
                    continue
                known = contents.declared.get(name)
                if (
                    known is not None
                    and settled is not None
                    and not settled.is_config_settled(name, config_stamp(folder), known.stamp)
                ):
                    waits = True
                    continue
                contents.declared[name] = contents.declare(folder, known)
                self._views.publish_model(name)
                waits = self.tell(name, settled) is None or waits
                if not contents.declared[name].found and name not in self._views.models:
                    del contents.declared[name]
            return waits

    def tell(
        self,
        name: str,
        settled: SettledSources | None = None,
        retry: Collection[int] = (),
        *,
        look: bool = True,
    ) -> bool | None:
        """Tell the manager what is to be served of a model; returns whether that ends a version.

        None if files are still being copied. Without `look`, files that have changed count as unchanged.
        Versions of `retry` are loaded even if their last loads have failed. The caller holds the lock.
        """
        declared = self._contents.declared[name]
        wanted = set(declared.served) | {key.version for key in self._asked_for if key.model == name}
        wanted &= declared.found
        absent = not wanted and not any(key.model == name for key in self._unloaded)
        waits = ends = False
        for version in sorted(wanted or ({1} if absent and declared.folder.origin else ()), reverse=True):
            key = VersionKey(name, version)
            if not self._versions.takes(key) or key in self._unloaded:
                continue
            source = self._contents.source(declared, version) if look else self._sources.get(key)
            if source is None:
                continue
            if settled is not None and not settled.is_settled(key, source):
                waits = True
                continue
            self._sources[key] = source
            self._views.stay(key)
            if isinstance(source, VersionSource):
                self._manager.want(key, source, retry=version in retry)
            else:
                self._manager.fail(key, source, source)
            wanted.add(version)
        succeeded = any(self.has_succeeded(VersionKey(name, version)) for version in wanted)
        for key, lifecycle in self._manager.lifecycles():
            if key.model != name or (key.version in wanted and key not in self._unloaded):
                continue
            vanished = key.version not in declared.found
            if vanished and settled is not None and not settled.is_settled(key, None):
                waits = True
                continue
            if not vanished and key not in self._unloaded and not succeeded:
                continue  # the newer version has yet to load
            if key not in self._unloaded or vanished:
                self._views.vanish(key)
                self._unloaded.discard(key)
                self._asked_for.discard(key)
            if lifecycle.wanted is not None:
                ends = True
                warm = not vanished and key not in self._unloaded
                self._manager.unwant(key, self._keep_warm_s if warm else 0.0)
            if lifecycle.actual in (lifecycle_rules.UNLOADED, lifecycle_rules.FAILED):
                self._manager.show(key)
        return None if waits else ends

    def tell_all(self) -> bool:
        """Tell the manager of all models, without a look at files; returns whether that ends a version."""
        with self.lock:
            ended = [self.tell(name, look=False) for name in list(self._contents.declared)]
        return any(ended)

    def ask_for(self, model: str, version: int | None) -> list[int]:
        """Want a version, or all that `model.toml` serves; returns which. The caller holds the lock.

        Raises ModelNotFound or VersionNotFound if the folder has no such version.
        """
        self._versions.stop_skipping(model, version)
        self.rescan(model)
        declared = self._contents.declared.get(model)
        if declared is None or not (declared.found or declared.folder.origin):
            raise ModelNotFound(f'no model is called "{model[:100]}"; {self._contents.path} has none either')
        versions = [version] if version is not None else declared.served or [1]
        if version is not None and version not in declared.found:
            have = names_text([*map(str, sorted(declared.found))])
            raise VersionNotFound(f'"{model}" has no version {version}; {self._contents.path} has {have}')
        for number in versions:
            key = VersionKey(model, number)
            self._unloaded.discard(key)
            if number not in declared.served:
                self._asked_for.add(key)
        self._views.publish_model(model)
        self.tell(model, retry=versions)
        return versions

    def unload(self, model: str, versions: Collection[int]) -> None:
        """Want versions no longer, until somebody asks for them. The caller holds the lock."""
        for number in versions:
            key = VersionKey(model, number)
            self._unloaded.add(key)
            self._asked_for.discard(key)
            self._views.stay(key)
            self._manager.unwant(key)
        for number in versions:
            self._manager.unload_failed(VersionKey(model, number))

    def take_back_unload(self, model: str, versions: Collection[int]) -> None:
        """Forget that somebody has unloaded versions, because the job was cancelled."""
        self._unloaded -= {VersionKey(model, number) for number in versions}

    def take_back_load(self, model: str, versions: Collection[int]) -> None:
        """Leave versions unloaded whose load was cancelled, until somebody asks for them."""
        for number in versions:
            key = VersionKey(model, number)
            if not self.has_succeeded(key):
                self._unloaded.add(key)

    def has_succeeded(self, key: VersionKey) -> bool:
        """Whether a version serves what it was last to be loaded from."""
        lifecycle = self._manager.lifecycle(key)
        return lifecycle is not None and lifecycle.succeeded
