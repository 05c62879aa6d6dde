"""Remembers the outputs of runs, so that an equal request needs no second run.

A key is made of what the model sees, not of the bytes that came: the decoded tensors, with their names,
datatypes and shapes, and the outputs asked for. Two bodies with one key therefore have one answer, however
they were compressed, cut into chunks or spelled. The tenant is in the key, and the version's digest decides
which entries there are, so no tenant is answered from another's entries.

Outputs are kept when their key comes for the second time. Requests that never come again, of which most
traffic may consist, then cost little and drive out nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import count
from typing import Any, Final

import numpy as np

from inferpool.observe.metrics import Metrics, Sample
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import READY, ModelView, VersionView
from inferpool.tensors import Tensors

_MOST_EXACT_NUMBERS: Final = 256
"""Tensors of at most so many numbers are a key themselves; larger ones are hashed to 256 bits."""
_MOST_FORMS: Final = 4096
"""Combinations of tenant, outputs, datatype and shape that have a number; all others are hashed."""
_SEEN_BITS: Final = 14
_MOST_SEEN: Final = 1 << _SEEN_BITS
"""So many keys at most are remembered to have come once, by their hashes.

A key is remembered until another comes with the same last bits.
"""
_HASH_BITS: Final = (1 << (_SEEN_BITS + 16)) - 1
"""The bits of a hash that count: the place of a key in a table, and 16 bits that tell keys of a place apart.

One key in 65,536 is taken for another, and its outputs are kept although it comes for the first time. The 16
bits are in two lists of small integers, which Python never allocates anew. Both lists take 256 KiB.
"""

NOT_CACHED: Final = 0
HIT: Final = 1
MISS: Final = 2
SHARED: Final = 3
CACHE_HEADERS: Final = (
    (b"cache-status", b""),
    (b"cache-status", b"inferpool; hit"),
    (b"cache-status", b"inferpool; fwd=miss"),
    (b"cache-status", b"inferpool; fwd=miss; collapsed"),
)
"""Cache-Status (RFC 9211): of an answer that was cached, of a run, and of a run that was shared.

The headers are put on responses with the first lines of their heads (`ResponsePrefix`), which are cached.
"""

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

    __slots__ = ("outputs", "shelf", "size", "version")

    def __init__(self, outputs: Tensors, size: int, shelf: _Shelf, version: VersionCache) -> None:
        self.outputs = outputs
        self.size = size
        self.shelf = shelf
        self.version = version


class _Shelf:
    """The entries of one tenant, the least recently used first, and their bytes."""

    __slots__ = ("entries", "name", "used")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: OrderedDict[bytes, _Kept] = OrderedDict()
        self.used = 0


class _Form:
    """What all requests whose keys begin with `prefix` have in common.

    The next request is usually of the form of the last one, and comparing forms is quicker than hashing one.
    """

    __slots__ = ("dtype", "name", "prefix", "shape", "tenant", "wanted")

    def __init__(
        self, tenant: str, wanted: tuple[str, ...] | None, name: str, dtype: Any, shape: Any, prefix: bytes
    ) -> None:
        self.tenant = tenant
        self.wanted = wanted
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.prefix = prefix


class VersionCache:
    """The cached outputs of one version as it was loaded.

    Attributes:
        digest: of its files and of what else its outputs depend on.
        flights: the `PredictContext` whose run equal requests may join, by key; for the event loop alone.
        hits: counts requests that were answered from the cache.
        misses: counts requests that ran.
        shared: counts requests that got the outputs of another request's run.
        kept: the entries of this version, by key.
        dropped: whether the version is gone or has been replaced.
    """

    __slots__ = (
        "_cache", "_forms", "_last_form", "_numbers", "_prefix", "_seen_high", "_seen_low", "digest",
        "dropped", "flights", "hits", "kept", "misses", "shared",
    )  # fmt: skip

    def __init__(
        self, cache: ResponseCache, key: VersionKey, digest: str, numbers: Iterator[int], metrics: Metrics
    ) -> None:
        """Keep outputs in `cache`, and count requests in `metrics`; no number comes twice in `numbers`."""
        labels = (key.model, str(key.version))
        self._cache = cache
        self._numbers = numbers
        self._prefix = next(numbers).to_bytes(8, "little")
        self._forms: dict[tuple[Any, ...], bytes] = {}
        self._last_form: _Form | None = None
        self._seen_low: list[int] = [0] * _MOST_SEEN
        self._seen_high: list[int] = [0] * _MOST_SEEN
        self.digest = digest
        self.flights: dict[bytes, Any] = {}
        self.kept: dict[bytes, _Kept] = {}
        self.dropped = False
        self.hits = metrics.value("cache_requests_total", *labels, "hit")
        self.misses = metrics.value("cache_requests_total", *labels, "miss")
        self.shared = metrics.value("cache_requests_total", *labels, "shared")

    def key(
        self,
        tenant: str,
        wanted: tuple[str, ...] | None,
        tensors: Tensors,
        apart: Sequence[tuple[Sequence[int], Tensors]] = (),
        *,
        on_loop: bool,
    ) -> bytes | None:
        """Return the key of a request of `tenant` for the outputs `wanted`, in any thread.

        Its rows are `tensors`; if they run in parts, `apart` has each part and which rows they are. None if
        they hold anything but numbers and strings, or if they are too large to be hashed on the event loop.
        """
        if not apart and len(tensors) == 1:
            last = self._last_form
            if last is not None and wanted is last.wanted and tenant == last.tenant:
                # A look-up takes a third of the time of a loop over the only item.
                tensor: Any = tensors.get(last.name)
                if tensor is not None and tensor.dtype is last.dtype and tensor.shape == last.shape:
                    data: bytes = tensor.tobytes()
                    return last.prefix + data
            for name, array in tensors.items():
                tensor = array
                dtype, shape = tensor.dtype, tensor.shape
                if tensor.size <= _MOST_EXACT_NUMBERS and not dtype.hasobject:
                    form = (tenant, wanted, name, dtype, shape)
                    prefix = self._forms.get(form)
                    if prefix is None and len(self._forms) < _MOST_FORMS:
                        # Another thread may have been quicker.
                        prefix = self._forms.setdefault(form, next(self._numbers).to_bytes(8, "little"))
                    if prefix is not None:
                        self._last_form = _Form(tenant, wanted, name, dtype, shape, prefix)
                        data = tensor.tobytes()
                        return prefix + data
        return self._hashed_key(tenant, wanted, apart or (((), tensors),), on_loop=on_loop)

    def _hashed_key(
        self,
        tenant: str,
        wanted: tuple[str, ...] | None,
        parts: Sequence[tuple[Sequence[int], Tensors]],
        *,
        on_loop: bool,
    ) -> bytes | None:
        digest = blake2b(digest_size=32)
        forms: list[Any] = [tenant, wanted]
        for rows, tensors in parts:
            forms.append(list(rows))
            for name, array in tensors.items():
                tensor: Any = array
                forms.append((name, tensor.dtype, tensor.shape))
                if tensor.dtype.hasobject:
                    if (on_loop and tensor.size > _MOST_TEXTS) or not _hash_texts(digest, tensor):
                        return None
                elif on_loop and tensor.nbytes > _MOST_HASHED_BYTES:
                    return None
                else:
                    if not tensor.flags.c_contiguous:
                        tensor = np.ascontiguousarray(tensor)
                    digest.update(tensor)
        digest.update(repr(forms).encode("utf-8", "backslashreplace"))
        return self._prefix + digest.digest()

    def find(self, key: bytes) -> Tensors | None:
        """Return the outputs for `key`, which now are the most recently used; None if there are none."""
        return self._cache.find(key, self.kept[key]) if key in self.kept else None

    def keep(self, shelf: str, key: bytes, outputs: Tensors, *, again: bool) -> None:
        """Keep a copy of `outputs` in the `shelf` unless they are too large, or no arrays.

        Nothing is kept when a key comes for the first time, unless `again` says that it came several times.
        """
        number = hash(key) & _HASH_BITS  # `bytes` keep their hash
        index = number & (_MOST_SEEN - 1)
        low, high = number >> _SEEN_BITS & 255, number >> (_SEEN_BITS + 8)
        if again or (self._seen_low[index] == low and self._seen_high[index] == high):
            self._cache.keep(self, shelf, key, outputs)
            return
        self._seen_low[index] = low
        self._seen_high[index] = high


class ResponseCache:
    """The cached outputs of all versions of this process, bounded in bytes.

    If there is no room, the tenant that holds most bytes loses its least recently used entry: a tenant with
    many requests cannot drive out those of others. May be used from any thread.

    Attributes:
        limit: bytes that all entries may take together; 0 if nothing is cached.
        used: bytes that they take.
    """

    __slots__ = (
        "_dropped", "_evictions", "_lock", "_metrics", "_numbers", "_shelves", "_versions", "limit", "used",
    )  # fmt: skip

    def __init__(self, limit: int, metrics: Metrics) -> None:
        """Hold at most `limit` bytes, and count in `metrics`."""
        self.limit = limit
        self.used = 0
        self._metrics = metrics
        self._lock = threading.Lock()
        self._numbers: Iterator[int] = count()
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
                found = VersionCache(self, view.key, digest, self._numbers, self._metrics)
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

    def find(self, key: bytes, kept: _Kept) -> Tensors:
        """Return the outputs of the entry for `key`, which now is the most recently used one."""
        with self._lock:
            if key in kept.shelf.entries:  # else another thread has just dropped it
                kept.shelf.entries.move_to_end(key)
        return kept.outputs

    def keep(self, version: VersionCache, shelf: str, key: bytes, outputs: Tensors) -> None:
        """Keep a copy of `outputs` for a version unless they are too large, or no arrays."""
        size = _size_of(outputs) + len(key)
        if size > min(MOST_KEPT_BYTES, self.limit // 4):
            return
        copies = {name: _copy(array) for name, array in outputs.items()}
        with self._lock:
            self._sweep()
            if version.dropped or key in version.kept:
                return
            while self.used + size > self.limit:
                self._evict()
            found = self._shelves.get(shelf)
            if found is None:
                found = self._shelves[shelf] = _Shelf(shelf)
            kept = _Kept(copies, size, found, version)
            found.entries[key] = kept
            version.kept[key] = kept
            found.used += size
            self.used += size

    def readings(self) -> list[Sample]:
        """Return the gauges of the cache, and free entries of dropped versions."""
        with self._lock:
            self._sweep()
        return [
            ("cache_bytes", (), float(self.used)),
            ("cache_limit_bytes", (), float(self.limit)),
        ]

    def _drop(self, version: VersionCache) -> None:
        """Let nobody find a version again. Its entries are freed in pieces, because there may be many."""
        version.dropped = True
        self._dropped.append(version)
        self._sweep()

    def _sweep(self) -> None:
        """Free some entries of dropped versions; the lock is held."""
        for _ in range(_SWEPT_ENTRIES):
            if not self._dropped:
                return
            entries = self._dropped[-1].kept
            if not entries:
                self._dropped.pop()
                continue
            key, kept = entries.popitem()
            self._remove(key, kept)

    def _evict(self) -> None:
        """Free the least recently used entry of the tenant that holds most; the lock is held."""
        fullest: _Shelf | None = None
        for shelf in self._shelves.values():
            if fullest is None or shelf.used > fullest.used:
                fullest = shelf
        assert fullest is not None  # there are bytes in use
        key = next(iter(fullest.entries))
        kept = fullest.entries[key]
        kept.version.kept.pop(key, None)
        self._remove(key, kept)
        self._evictions.add()

    def _remove(self, key: bytes, kept: _Kept) -> None:
        shelf = kept.shelf
        del shelf.entries[key]
        shelf.used -= kept.size
        self.used -= kept.size
        if not shelf.entries:
            del self._shelves[shelf.name]


def _hash_texts(digest: blake2b, texts: Any) -> bool:
    """Hash strings with their lengths; returns False if there is anything else."""
    for text in texts.flat:
        if isinstance(text, str):
            piece = b"s" + text.encode("utf-8", "surrogatepass")
        elif isinstance(text, bytes):
            piece = b"b" + text
        else:
            return False
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return True


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


def _copy(output: Any) -> Any:
    """Return a read-only copy: an output may be a view of a batch, or of memory that is used again."""
    copy = output.copy()
    copy.flags.writeable = False
    return copy
