"""What the response cache keeps, for whom, and how much of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from inferpool.http.predict.response_cache import (
    MOST_KEPT_BYTES,
    ResponseCache,
    VersionCache,
)
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import FAILED, READY, ModelView, State, VersionView
from inferpool.tensors import Tensors

LIMIT = 64 * 1024
TENANTS = ("", "a", "b")


def view(digest: str | None = "one", version: int = 1, state: State = READY) -> VersionView:
    return VersionView(VersionKey("m", version), state, cache_digest=digest)


def models(*views: VersionView) -> dict[str, ModelView]:
    return {"m": ModelView("m", "", {each.key.version: each for each in views}, {})}


def cache_of(cache: ResponseCache, of: VersionView) -> VersionCache:
    found = cache.of(of)
    assert found is not None
    return found


def key_of(version: VersionCache, tenant: str = "", **tensors: Any) -> bytes:
    parts: Tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    key = version.key(tenant, None, parts, on_loop=True)
    assert key is not None
    return key


def outputs(number: float, size: int = 1) -> Tensors:
    return {"y": np.full(size, number)}


@pytest.fixture
def cache() -> ResponseCache:
    return ResponseCache(LIMIT, Metrics({}))


def test_a_key_tells_apart_all_that_an_answer_depends_on(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    keys = [
        key_of(version, x=rows),
        key_of(version, x=rows.reshape(3, 2)),
        key_of(version, x=rows.reshape(6)),
        key_of(version, x=rows.view(np.int32)),
        key_of(version, x=-rows),
        key_of(version, z=rows),
        key_of(version, "a", x=rows),
        key_of(version, "b", x=rows),
        key_of(version, x=rows, z=rows),
        key_of(cache_of(cache, view("two")), x=rows),
        key_of(cache_of(cache, view(version=2)), x=rows),
        version.key("", ("y",), {"x": rows}, on_loop=True),
        version.key("", ("y", "z"), {"x": rows}, on_loop=True),
        *(
            version.key("", None, {}, [(one, {"x": rows[:1]}), (two, {"x": rows[1:]})], on_loop=True)
            for one, two in (([0], [1]), ([1], [0]))
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(version, x=rows) == keys[0]
    # An array that lies otherwise in memory has the same numbers.
    assert key_of(version, x=np.asfortranarray(rows)) == keys[0]
    assert key_of(version, x=np.repeat(rows, 2, axis=1)[:, ::2]) == keys[0]


def test_strings_are_told_apart_by_where_they_end(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    texts: list[list[object]] = [["ab", "c"], ["a", "bc"], ["abc", ""], ["", "abc"], [b"ab", b"c"]]
    keys = {key_of(version, x=np.array(text, dtype=np.object_)) for text in texts}
    assert len(keys) == len(texts)


def test_what_cannot_be_a_key_is_not_cached(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    objects: Any = np.array([{"a": 1}], dtype=np.object_)
    assert version.key("", None, {"x": objects}, on_loop=False) is None
    large = {"x": np.zeros(2**20 + 1, np.uint8)}
    assert version.key("", None, large, on_loop=True) is None
    assert version.key("", None, large, on_loop=False) is not None


def test_outputs_are_copies_that_nobody_can_change(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    key = key_of(version, x=[1.0])
    given = outputs(7)
    version.keep("", key, given, again=True)
    given["y"][:] = 8
    found = version.find(key)
    assert found is not None
    np.testing.assert_array_equal(found["y"], [7])
    with pytest.raises(ValueError, match="read-only"):
        found["y"][:] = 9


def test_outputs_are_kept_when_their_key_comes_again(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    once, twice = key_of(version, x=[1.0]), key_of(version, x=[2.0])
    version.keep("", once, outputs(1), again=False)
    for _ in range(2):
        version.keep("", twice, outputs(2), again=False)
    assert version.find(once) is None
    assert version.find(twice) is not None


@pytest.mark.parametrize("size", [1, 10_000])
def test_small_and_large_tensors_have_keys_that_differ_in_every_byte(cache: ResponseCache, size: int) -> None:
    version = cache_of(cache, view())
    row = np.zeros(size, np.uint8)
    keys = {key_of(version, x=row)}
    for index in {0, size // 2, size - 1}:
        row[index] = 1
        keys.add(key_of(version, x=row))
        row[index] = 0
    assert len(keys) == 1 + len({0, size // 2, size - 1})
    assert all(len(key) <= 8 + 256 * 8 for key in keys)


def test_many_shapes_take_no_more_memory_and_keep_their_keys_apart(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    arrays = [np.zeros((1,) * (number % 20) + (number // 20,), np.uint8) for number in range(5000)]
    keys = [key_of(version, x=array) for array in arrays]
    assert len(set(keys)) == len(keys)
    assert [key_of(version, x=array) for array in arrays] == keys
    assert len(version._forms) == 4096


@pytest.mark.parametrize(
    "kept",
    [
        {"y": np.zeros(MOST_KEPT_BYTES + 1, np.uint8)},
        {"y": np.array(["x"] * 2000, dtype=np.object_)},
        {"y": np.array([{"a": 1}], dtype=np.object_)},
        {"y": [{"a": 1}]},
    ],
)
def test_outputs_that_are_large_or_no_arrays_are_not_kept(kept: Any) -> None:
    cache = ResponseCache(2**30, Metrics({}))
    version = cache_of(cache, view())
    key = key_of(version, x=[1.0])
    version.keep("", key, kept, again=True)
    assert version.find(key) is None
    assert cache.used == 0


def test_a_tenant_cannot_drive_out_another(cache: ResponseCache) -> None:
    version = cache_of(cache, view())
    quiet = [key_of(version, "a", x=[float(number)]) for number in range(5)]
    for key in quiet:
        version.keep("a", key, outputs(1), again=True)
    for number in range(500):
        version.keep("b", key_of(version, "b", x=[float(number)]), outputs(2), again=True)
    assert all(version.find(key) is not None for key in quiet)
    assert LIMIT // 2 < cache.used <= LIMIT


def test_a_version_that_is_gone_failed_or_replaced_loses_its_entries(cache: ResponseCache) -> None:
    for left in ([], [view(state=FAILED)], [view("two")], [view(None)]):
        version = cache_of(cache, view())
        other = cache_of(cache, view(version=2))
        key, stays = key_of(version, x=[1.0]), key_of(other, x=[1.0])
        version.keep("", key, outputs(1), again=True)
        other.keep("", stays, outputs(2), again=True)
        cache.keep_only(models(*left, view(version=2)))
        assert version.find(key) is None
        assert other.find(stays) is not None
        version.keep("", key, outputs(1), again=True)  # by a run that had begun before
        assert version.find(key) is None
        again = cache_of(cache, view())
        assert key_of(again, x=[1.0]) != key
        assert again.find(key_of(again, x=[1.0])) is None


def test_many_entries_of_a_dropped_version_are_freed_in_pieces() -> None:
    cache = ResponseCache(2**22, Metrics({}))
    version = cache_of(cache, view())
    for number in range(1000):
        version.keep("", key_of(version, x=[float(number)]), outputs(1), again=True)
    full = cache.used
    cache.keep_only({})
    assert 0 < cache.used < full
    for _ in range(4):
        cache.readings()
    assert cache.used == 0


def test_without_a_limit_or_a_digest_nothing_is_cached(cache: ResponseCache) -> None:
    assert ResponseCache(0, Metrics({})).of(view()) is None
    assert cache.of(view(None)) is None


class Machine(RuleBasedStateMachine):
    """The cache beside a plain list of what was used last, without bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ResponseCache(LIMIT, Metrics({}))
        self.digests = ["one", "one"]
        self.expected: dict[tuple[int, str, str, int], float] = {}
        self.used: dict[str, list[tuple[int, str, int]]] = {tenant: [] for tenant in TENANTS}
        self.number = 0.0

    def at(self, which: int, tenant: str, value: int) -> tuple[VersionCache, bytes]:
        version = cache_of(self.cache, view(self.digests[which], which))
        return version, key_of(version, tenant, x=[value])

    @rule(
        which=st.integers(0, 1),
        tenant=st.sampled_from(TENANTS),
        value=st.integers(0, 20),
        size=st.integers(1, 1000),
    )
    def request(self, which: int, tenant: str, value: int, size: int) -> None:
        version, key = self.at(which, tenant, value)
        name = (which, self.digests[which], tenant, value)
        found = version.find(key)
        if found is not None:
            assert found["y"][0] == self.expected[name]  # never another's, nor an earlier version's
        else:
            self.number += 1
            self.expected[name] = self.number
            version.keep(tenant, key, outputs(self.number, size), again=True)
            assert version.find(key) is not None  # the newest always has room
        recent = self.used[tenant]
        if (which, self.digests[which], value) in recent:
            recent.remove((which, self.digests[which], value))
        recent.append((which, self.digests[which], value))

    @rule(which=st.integers(0, 1), digest=st.sampled_from(["one", "two"]))
    def replace(self, which: int, digest: str) -> None:
        if self.digests[which] != digest:
            self.digests[which] = digest
            for name in [name for name in self.expected if name[0] == which]:
                del self.expected[name]
            for recent in self.used.values():
                recent[:] = [each for each in recent if each[0] != which]
            self.cache.keep_only(models(*(view(self.digests[each], each) for each in (0, 1))))

    @invariant()
    def bytes_are_bounded_and_counted(self) -> None:
        shelves = self.cache._shelves
        sizes = [kept.size for shelf in shelves.values() for kept in shelf.entries.values()]
        assert sum(sizes) == self.cache.used <= LIMIT

    @invariant()
    def what_was_used_last_is_kept(self) -> None:
        for tenant, recent in self.used.items():
            kept = [self.is_kept(tenant, *name) for name in recent]
            assert kept == sorted(kept), "an entry outlived one that was used after it"

    def is_kept(self, tenant: str, which: int, digest: str, value: int) -> bool:
        version = self.cache._versions.get(VersionKey("m", which))
        if version is None or version.digest != digest:
            return False
        shelf = self.cache._shelves.get(tenant)
        return shelf is not None and key_of(version, tenant, x=[value]) in shelf.entries


def test_the_policy_holds_whatever_is_asked_for() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
