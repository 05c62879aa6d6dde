"""Waiting until the last request has its response."""

from __future__ import annotations

import asyncio

from inferpool.http.predict.in_flight import InFlight


def test_accepted_requests_are_waited_for_without_end_and_incomplete_ones_for_a_while() -> None:
    async def drain() -> list[str]:
        in_flight, events = InFlight(), ["begin"]
        in_flight.requests, in_flight.accepted = 2, 1  # one runs, the body of the other is incomplete

        async def wait() -> None:
            await in_flight.wait_idle(grace_s=0.0)
            events.append("idle")

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        events.append("response")
        in_flight.release()
        in_flight.leave()
        await waiting
        assert in_flight.requests == 1, "the incomplete request is given up once its time is over"
        return events

    assert asyncio.run(drain()) == ["begin", "response", "idle"]


def test_an_idle_server_is_not_waited_for() -> None:
    async def drain() -> None:
        await InFlight().wait_idle(grace_s=3600.0)

    asyncio.run(drain())


def test_the_last_incomplete_request_ends_the_wait() -> None:
    async def drain() -> None:
        in_flight = InFlight()
        in_flight.requests = 1
        asyncio.get_running_loop().call_soon(in_flight.leave)
        await in_flight.wait_idle(grace_s=3600.0)

    asyncio.run(drain())
