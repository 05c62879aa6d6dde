"""Lookups of hosts end at the deadlines of those who ask, and take few threads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from inferpool.allowance import UNLIMITED
from inferpool.errors import InvalidInput
from inferpool.http.predict.host_lookups import HostLookups
from inferpool.http.predict.picture_urls import PictureUrls

from tests.server import wait_until


class SlowNames:
    """A resolver that answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go_on = threading.Event()

    def find(self, host: str, port: int, **_: object) -> list[Any]:
        self.asked.append(host)
        if host != "fast":
            self.go_on.wait(60)
        if host == "unknown":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", ("192.0.2.1", port))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowNames]:
    names = SlowNames()
    monkeypatch.setattr(socket, "getaddrinfo", names.find)
    yield names
    names.go_on.set()


def soon() -> float:
    return time.monotonic() + 0.05


def later() -> float:
    return time.monotonic() + 60


def test_a_lookup_ends_at_the_deadline_of_who_asks_and_is_not_repeated(names: SlowNames) -> None:
    lookups = HostLookups()
    for _ in range(5):
        with pytest.raises(TimeoutError):
            lookups.find("slow", 80, soon())
    assert names.asked == ["slow"]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lookups.find, "slow", 80, later())
        names.go_on.set()
        assert waiting.result() == [(0, 0, 0, "", ("192.0.2.1", 80))]
    assert names.asked == ["slow"]
    assert lookups.find("slow", 80, later()) == [(0, 0, 0, "", ("192.0.2.1", 80))]
    assert names.asked == ["slow", "slow"]


def test_the_threads_are_bounded_and_free_again(names: SlowNames) -> None:
    lookups = HostLookups(most=2)
    for host in ("one", "two", "three", "fast"):
        with pytest.raises(TimeoutError):
            lookups.find(host, 80, soon())
    assert sorted(names.asked) == ["one", "two"]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lookups.find, "fast", 80, later())
        names.go_on.set()
        assert waiting.result()


def test_each_who_asks_gets_an_error_of_its_own(names: SlowNames) -> None:
    lookups = HostLookups()
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(lookups.find, "unknown", 80, later()) for _ in range(2)]
        wait_until(lambda: bool(names.asked), "the lookup has begun")
        names.go_on.set()
        first, second = (each.exception() for each in waiting)
    assert isinstance(first, socket.gaierror)
    assert isinstance(second, socket.gaierror)
    assert first is not second


def test_a_picture_whose_host_is_not_found_in_time_is_refused(names: SlowNames) -> None:
    urls = PictureUrls(["http://images.example"])
    with pytest.raises(InvalidInput, match=r"images\.example did not answer in time"):
        urls.fetch("http://images.example/x.png", UNLIMITED, soon())


def test_without_a_thread_the_lookup_fails_and_a_later_one_succeeds(
    names: SlowNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = HostLookups(most=1)

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="no thread"):
            lookups.find("fast", 80, later())
    assert lookups.find("fast", 80, later())
