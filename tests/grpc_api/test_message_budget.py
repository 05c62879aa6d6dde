"""Messages are received as far as there is room for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from inferpool.errors import Overloaded, RateLimited, TooSlow
from inferpool.grpc_api import message_budget
from inferpool.grpc_api.message_budget import COPIES, FIRST_BYTES, SMALL_BYTES, MessageBudget, ReceivedMessage

MOST = 10 * FIRST_BYTES
WHOLE = COPIES * MOST


async def read(budget: MessageBudget, receive: Callable[[], Awaitable[bytes]]) -> bytes:
    message = ReceivedMessage(budget)
    try:
        return await message.read(receive)
    finally:
        message.close()


async def never() -> bytes:
    return await asyncio.get_running_loop().create_future()


async def small() -> bytes:
    return b"x"


def test_a_message_reserves_what_it_takes_until_it_is_closed() -> None:
    async def run() -> None:
        total = 9 * WHOLE + SMALL_BYTES
        budget = MessageBudget(total, MOST)
        message = ReceivedMessage(budget)
        assert await message.read(small) == b"x"
        assert not budget.could_take(total + 1)
        assert budget.take(total - COPIES)
        assert not budget.take(1)
        message.close()
        assert budget.take(COPIES)

    asyncio.run(run())


def test_a_slow_message_reserves_the_most_and_small_ones_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_budget, "MOMENT_S", 0.0)

    async def run() -> None:
        budget = MessageBudget(0, MOST)
        slow = asyncio.create_task(read(budget, never))
        while budget.take(SMALL_BYTES + 1):  # until the slow one has reserved all it may take
            budget.give(SMALL_BYTES + 1)
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="large message"):
            await read(budget, never)
        assert await read(budget, small) == b"x"
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert budget.take(WHOLE)

    asyncio.run(run())


def test_streams_hold_the_largest_message_each_and_half_of_all_bytes_together() -> None:
    most = 2**20
    budget = MessageBudget(64 * most, most)
    held = [budget.take_for_stream(None) for _ in range(16)]
    assert held == [budget.most] * 16
    with pytest.raises(Overloaded, match="another stream"):
        budget.take_for_stream(None)
    assert budget.take(2 * budget.most)
    budget.give_for_stream(held.pop(), None)
    assert budget.take_for_stream(None) == budget.most


def test_a_tenant_has_half_of_the_streams_at_most_and_at_least_one() -> None:
    most = 2**20
    budget = MessageBudget(64 * most, most)
    for _ in range(8):
        budget.take_for_stream("greedy")
    with pytest.raises(RateLimited, match=r"has 8 open streams, and 8 is the most; end one") as raised:
        budget.take_for_stream("greedy")
    assert raised.value.members == {"limit": 8}
    for tenant in ("", "other"):
        assert budget.take_for_stream(tenant) == budget.most
    budget.give_for_stream(budget.most, "greedy")
    assert budget.take_for_stream("greedy") == budget.most
    for _ in range(8):
        budget.give_for_stream(budget.most, "greedy")
    assert budget._streams == {"": 1, "other": 1}
    small = MessageBudget(2 * most, most)
    assert small.take_for_stream("greedy") == small.most


def test_without_room_no_message_is_received() -> None:
    async def run() -> None:
        budget = MessageBudget(0, MOST)
        assert budget.take(WHOLE + SMALL_BYTES)
        with pytest.raises(Overloaded, match="another message"):
            await read(budget, small)

    asyncio.run(run())


def test_a_message_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_budget, "MOMENT_S", 0.0)
    monkeypatch.setattr(message_budget, "READ_S", 0.01)

    async def run() -> None:
        budget = MessageBudget(0, MOST)
        with pytest.raises(TooSlow, match="send it faster"):
            await read(budget, never)
        assert budget.take(WHOLE)

    asyncio.run(run())
