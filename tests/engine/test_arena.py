"""Blocks of shared memory: none overlap, all come back, and freed memory leaves the process."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.engine.arena import ALIGNMENT, Arena, ArenaView, make_arena
from inferpool.engine.event_loop import Loop
from inferpool.errors import Overloaded

MIB = 1024 * 1024


def arena_of(nbytes: int) -> Arena:
    descriptor = make_arena(nbytes)
    try:
        return Arena(descriptor)
    finally:
        os.close(descriptor)


def resident(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.one_of(
            st.integers(1, 3000),
            st.integers(3000, 70_000),
            st.integers(65_530, 65_545),
            st.integers(70_000, 1_500_000),
            st.integers(0, 40).map(lambda index: -1 - index),
        ),
        max_size=80,
    )
)
def test_blocks_never_overlap_and_all_memory_comes_back(steps: list[int]) -> None:
    arena = arena_of(4 * MIB)
    blocks: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            try:
                offset = arena.allocate(step)
            except Overloaded:
                continue
            assert offset % ALIGNMENT == 0
            assert offset >= 0
            assert offset + step <= offset + arena.block_size(step) <= arena.size
            for other, size in blocks:
                assert offset + step <= other or other + size <= offset
            blocks.append((offset, step))
        elif blocks:
            arena.free(*blocks.pop((-step - 1) % len(blocks)))
        assert arena.used == sum(arena.block_size(size) for _, size in blocks)
        assert 0 <= arena.unused <= arena.size - arena.used
    for block in blocks:
        arena.free(*block)
    assert arena.used == 0
    # Whatever was cut into small pieces is one piece again if a large block needs it.
    arena.free(arena.allocate(arena.size), arena.size)


def test_a_full_arena_refuses_and_takes_again_what_is_freed() -> None:
    arena = arena_of(MIB)
    blocks: list[int] = []
    with contextlib.suppress(Overloaded):
        while len(blocks) < 2000:
            blocks.append(arena.allocate(1000))
    with pytest.raises(Overloaded, match="full"):
        arena.allocate(1000)
    assert len(blocks) >= 4 * (256 * 1024 // 1024)
    with pytest.raises(Overloaded):
        arena.allocate(100_000)
    arena.free(blocks.pop(), 1000)
    arena.allocate(1000)


def test_the_memory_of_freed_pages_goes_back_to_the_system() -> None:
    descriptor = make_arena(128 * MIB)
    arena = Arena(descriptor)
    for _ in range(3):
        blocks = [arena.allocate(4 * MIB) for _ in range(30)]
        for offset in blocks:
            arena.map[offset : offset + 4 * MIB] = bytes(4 * MIB)
        assert resident(descriptor) >= 120 * MIB
        for offset in blocks:
            arena.free(offset, 4 * MIB)
        assert resident(descriptor) <= 24 * MIB
    arena.trim()
    assert resident(descriptor) == 0
    os.close(descriptor)


class Timers:
    """The loop of an arena: callbacks with their delays, which are called by hand."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[..., object]]] = []

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        assert not args
        self.waiting.append((delay, callback))

    def run(self) -> None:
        """Call what waits, and what that plans for less than a second later."""
        self.waiting, now = [], self.waiting
        while now:
            for _, callback in now:
                callback()
            now = [timer for timer in self.waiting if timer[0] < 1]
            self.waiting = [timer for timer in self.waiting if timer[0] >= 1]


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_blocks_that_come_and_go_use_the_same_pages_until_they_are_no_longer_needed() -> None:
    timers = Timers()
    descriptor = make_arena(2048 * MIB)
    arena = Arena(descriptor, cast("Loop", timers))
    block, count = 600 * 1024, 128
    content = bytes(block)

    def burst() -> None:
        blocks = [arena.allocate(block) for _ in range(count)]
        for offset in blocks:
            arena.map[offset : offset + block] = content
        for offset in blocks:
            arena.free(offset, block)

    burst()
    before = page_faults()
    for _ in range(4):
        burst()
        timers.run()
        assert len(timers.waiting) == 1
    # Each block has 150 pages.
    assert page_faults() - before < count * 150 // 2
    assert resident(descriptor) >= count * block
    timers.run()
    assert resident(descriptor) == arena.unused <= 16 * MIB
    assert not timers.waiting  # nothing wakes a server that nobody asks
    os.close(descriptor)


def test_freed_pages_never_hold_more_than_their_share_of_the_arena() -> None:
    descriptor = make_arena(768 * MIB)
    arena = Arena(descriptor, cast("Loop", Timers()))
    blocks = [arena.allocate(4 * MIB) for _ in range(25)]
    for offset in blocks:
        arena.map[offset : offset + 4 * MIB] = bytes(4 * MIB)
    for offset in blocks:
        arena.free(offset, 4 * MIB)
    assert resident(descriptor) == arena.unused == 64 * MIB
    os.close(descriptor)


def test_no_process_can_resize_an_arena() -> None:
    descriptor = make_arena(1)
    for size in (0, 8 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


def test_a_view_has_only_blocks_within_the_arena() -> None:
    descriptor = make_arena(MIB)
    view = ArenaView(descriptor)
    os.close(descriptor)
    assert view.has_block(0, 64)
    assert view.has_block(MIB - 64, 64)
    assert view.has_block(0, MIB)
    for offset, size in ((MIB - 64, 65), (MIB, 64), (1, 64), (-64, 64), (0, 63), (64, MIB), (2**62, 64)):
        assert not view.has_block(offset, size)
    assert isinstance(view.map, mmap.mmap)
