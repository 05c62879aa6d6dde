"""Blocks of shared memory: none overlap, all come back, and freed memory leaves the process."""

from __future__ import annotations

import contextlib
import mmap
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.engine.arena import ALIGNMENT, Arena, ArenaView, make_arena
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
