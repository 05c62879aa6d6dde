"""Remembers the outputs of runs, so that an equal request needs no second run.

A key is made of what the model sees, not of the bytes that came: the decoded tensors, with their names,
datatypes and shapes, and the outputs asked for. Two bodies with one key therefore have one answer, however
they were compressed, cut into chunks or spelled. The tenant is in the key, and the version's digest decides
which entries there are, so no tenant is answered from another's entries.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final, TypeAlias

import numpy as np

from inferpool.observe.metrics import Metrics, Sample
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import READY, ModelView, VersionView
from inferpool.tensors import Tensors

CacheKey: TypeAlias = tuple[Any, ...]
"""The tenant, the number of the version's cache, the outputs asked for, the tensors' forms, and a digest."""

NOT_CACHED: Final = 0
HIT: Final = 1
MISS: Final = 2
SHARED: Final = 3
CACHE_STATUSES: Final = (
    b"",
    b"inferpool; hit",
    b"inferpool; fwd=miss",
    b"inferpool; fwd=miss; collapsed",
)
"""Values of Cache-Status (RFC 9211): of an answer that was cached, of a run, and of a run that was shared."""

HASHED_BYTES: Final = 64 * 1024
"""Larger bodies for a cached model are decoded, and their tensors hashed, in a background thread."""
_MOST_HASHED_BYTES: Final = 1024 * 1024
"""More bytes are not hashed on the event loop, where they would take longer than a millisecond."""
_MOST_TEXTS: Final = 1024
"""More strings are not hashed on the event loop."""
MOST_KEPT_BYTES: Final = 1024 * 1024
"""Larger outputs are not kept, because the event loop copies them."""
_ENTRY_BYTES: Final = 1024
"""Bytes that an entry takes without the numbers in its outputs: its key, a dictionary, and references."""
_OUTPUT_BYTES: Final = 192
"""Bytes that an array takes without its numbers, and its place in the dictionary."""
_SWEPT_ENTRIES: Final = 256
"""Entries of dropped versions that are freed at a time, in a tenth of a millisecond."""


class _Kept:
    """The outputs of one run, and how many bytes they take; the arrays are read-only."""

    __slots__ = ("outputs", "size", "version")

    def __init__(self, outputs: Tensors, size: int, version: VersionCache) -> None:
        self.outputs = outputs
        self.size = size
        self.version = version


class _Shelf:
    """The entries of one tenant, the least recently used first, and their bytes."""

    __slots__ = ("entries", "used")

    def __init__(self) -> None:
        self.entries: OrderedDict[CacheKey, _Kept] = OrderedDict()
        self.used = 0


class VersionCache:
    """The cached outputs of one version as it was loaded.

    Attributes:
        digest: of its files and of what else its outputs depend on.
        number: tells it apart from all others of this process.
        flights: the `Flight` that equal requests may join, by key; for the event loop alone.
        hits: counts requests that were answered from the cache.
        misses: counts requests that ran.
        shared: counts requests that got the outputs of another request's run.
        keys: the shelf of each entry, by key.
        dropped: whether the version is gone or has been replaced.
    """

    __slots__ = (
        "_cache", "digest", "dropped", "flights", "hits", "keys", "misses", "number", "shared",
    )  # fmt: skip

    def __init__(
        self, cache: ResponseCache, key: VersionKey, digest: str, number: int, metrics: Metrics
    ) -> None:
        """Keep outputs in `cache`, and count requests in `metrics`."""
        labels = (key.model, str(key.version))
        self._cache = cache
        self.digest = digest
        self.number = number
        self.flights: dict[CacheKey, Any] = {}
        self.keys: dict[CacheKey, str] = {}
        self.dropped = False
        self.hits = metrics.value("cache_requests_total", *labels, "hit")
        self.misses = metrics.value("cache_requests_total", *labels, "miss")
        self.shared = metrics.value("cache_requests_total", *labels, "shared")

    def key(
        self, tenant: str, wanted: tuple[str, ...] | None, parts: Sequence[Tensors], *, on_loop: bool
    ) -> CacheKey | None:
        """Return the key of a request of `tenant` for the outputs `wanted`, in any thread.

        `parts` are its tensors, in several parts if its rows run apart. None if they hold anything but
        numbers and strings, or if they are too large to be hashed on the event loop.
        """
        digest = blake2b(digest_size=32)
        forms: list[Any] = []
        for tensors in parts:
            for name, array in tensors.items():
                tensor: Any = array
                forms.append((name, tensor.dtype, tensor.shape))
                if tensor.dtype.kind == "O":
                    if on_loop and tensor.size > _MOST_TEXTS:
                        return None
                    for text in tensor.flat:
                        if isinstance(text, str):
                            piece = b"s" + text.encode("utf-8", "surrogatepass")
                        elif isinstance(text, bytes):
                            piece = b"b" + text
                        else:
                            return None
                        digest.update(len(piece).to_bytes(8, "little"))
                        digest.update(piece)
                elif on_loop and tensor.nbytes > _MOST_HASHED_BYTES:
                    return None
                else:
                    if not tensor.flags.c_contiguous:
                        tensor = np.ascontiguousarray(tensor)
                    digest.update(tensor)
        return (tenant, self.number, wanted, tuple(forms), digest.digest())

    def find(self, shelf: str, key: CacheKey) -> Tensors | None:
        """Return the outputs for `key`, which now are the most recently used of the `shelf`; else None."""
        return self._cache.find(shelf, key)

    def keep(self, shelf: str, key: CacheKey, outputs: Tensors) -> None:
        """Keep a copy of `outputs` in the `shelf` unless they are too large, or no arrays."""
        self._cache.keep(self, shelf, key, outputs)


class ResponseCache:
    """The cached outputs of all versions of this process, bounded in bytes.

    If there is no room, the tenant that holds most bytes loses its least recently used entry: a tenant with
    many requests cannot drive out those of others. May be used from any thread.

    Attributes:
        limit: bytes that all entries may take together; 0 if nothing is cached.
        used: bytes that they take.
    """

    __slots__ = (
        "_count",
        "_dropped",
        "_evictions",
        "_lock",
        "_metrics",
        "_shelves",
        "_versions",
        "limit",
        "used",
    )

    def __init__(self, limit: int, metrics: Metrics) -> None:
        """Hold at most `limit` bytes, and count in `metrics`."""
        self.limit = limit
        self.used = 0
        self._metrics = metrics
        self._lock = threading.Lock()
        self._count = 0
        self._shelves: dict[str, _Shelf] = {}
        self._versions: dict[VersionKey, VersionCache] = {}
        self._dropped: list[VersionCache] = []
        self._evictions = metrics.value("cache_evictions_total")

    def of(self, view: VersionView) -> VersionCache | None:
        """Return the cache of a version; None if its model's answers are not to be cached.

        The entries of another version of the same number are dropped.
        """
        digest = view.cache_digest
        if digest is None or not self.limit:
            return None
        with self._lock:
            found = self._versions.get(view.key)
            if found is None or found.digest != digest:
                if found is not None:
                    self._drop(found)
                self._count += 1
                found = VersionCache(self, view.key, digest, self._count, self._metrics)
                self._versions[view.key] = found
        return found

    def keep_only(self, models: Mapping[str, ModelView]) -> None:
        """Drop the entries of versions that are not ready, or not the same any more, in `models`."""
        if not self._versions and not self._dropped:
            return
        with self._lock:
            for key, cache in list(self._versions.items()):
                model = models.get(key.model)
                view = None if model is None else model.versions.get(key.version)
                if view is None or view.state != READY or view.cache_digest != cache.digest:
                    del self._versions[key]
                    self._drop(cache)

    def find(self, shelf: str, key: CacheKey) -> Tensors | None:
        """Return the outputs for `key`, which now are the most recently used of the `shelf`; else None."""
        with self._lock:
            found = self._shelves.get(shelf)
            if found is None:
                return None
            kept = found.entries.get(key)
            if kept is None:
                return None
            found.entries.move_to_end(key)
            return kept.outputs

    def keep(self, version: VersionCache, shelf: str, key: CacheKey, outputs: Tensors) -> None:
        """Keep a copy of `outputs` for a version unless they are too large, or no arrays."""
        size = _size_of(outputs)
        if size > min(MOST_KEPT_BYTES, self.limit // 4):
            return
        copies = {name: _kept(array) for name, array in outputs.items()}
        with self._lock:
            self._sweep()
            if version.dropped or key in version.keys:
                return
            while self.used + size > self.limit:
                self._evict()
            found = self._shelves.get(shelf)
            if found is None:
                found = self._shelves[shelf] = _Shelf()
            found.entries[key] = _Kept(copies, size, version)
            found.used += size
            self.used += size
            version.keys[key] = shelf

    def readings(self) -> list[Sample]:
        """Return the gauges of the cache, and free entries of dropped versions."""
        with self._lock:
            self._sweep()
        return [
            ("cache_bytes", (), float(self.used)),
            ("cache_limit_bytes", (), float(self.limit)),
        ]

    def _drop(self, version: VersionCache) -> None:
        """Find nothing of a version any more. Its entries are freed in pieces, because there may be many."""
        version.dropped = True
        self._dropped.append(version)
        self._sweep()

    def _sweep(self) -> None:
        """Free some entries of dropped versions; the lock is held."""
        for _ in range(_SWEPT_ENTRIES):
            if not self._dropped:
                return
            keys = self._dropped[-1].keys
            if not keys:
                self._dropped.pop()
                continue
            key, name = keys.popitem()
            self._remove(name, key)

    def _evict(self) -> None:
        """Free the least recently used entry of the tenant that holds most; the lock is held."""
        name, fullest = "", None
        for other, shelf in self._shelves.items():
            if fullest is None or shelf.used > fullest.used:
                name, fullest = other, shelf
        assert fullest is not None  # there are bytes in use
        self._evictions.add()
        self._remove(name, next(iter(fullest.entries)))

    def _remove(self, name: str, key: CacheKey) -> None:
        shelf = self._shelves[name]
        kept = shelf.entries.pop(key)
        shelf.used -= kept.size
        self.used -= kept.size
        kept.version.keys.pop(key, None)
        if not shelf.entries:
            del self._shelves[name]


def _size_of(outputs: Tensors) -> int:
    """Return the bytes that copies of `outputs` take; more than are ever kept if one is no small array."""
    size = _ENTRY_BYTES
    for output in outputs.values():
        if not isinstance(output, np.ndarray):
            return MOST_KEPT_BYTES + 1
        size += output.nbytes + _OUTPUT_BYTES
        if output.dtype.kind == "O":
            if output.size > _MOST_TEXTS:
                return MOST_KEPT_BYTES + 1
            for text in output.flat:
                if not isinstance(text, (str, bytes)):
                    return MOST_KEPT_BYTES + 1
                size += 64 + 4 * len(text)
    return size


def _kept(output: Any) -> Any:
    """Return a read-only copy: an output may be a view of a batch, or of memory that is used again."""
    copy = output.copy()
    copy.flags.writeable = False
    return copy
