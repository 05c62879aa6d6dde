"""Both ends of a channel in one process, with an event loop and an inbox that tests move by hand."""

from __future__ import annotations

import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from inferpool.engine.arena import make_arena
from inferpool.engine.client import MOST_ENTRIES, EngineClient, Suspects
from inferpool.engine.engine_port import EnginePort
from inferpool.errors import InferpoolError
from inferpool.pool.ports import Entry, Result, VersionKey
from inferpool.tensors import Tensors

from tests.server import START_S

KEY = VersionKey("m", 1)
MIB = 1024 * 1024

OPEN: list[Engine | Web] = []
"""What tests have made and not closed."""


class HandLoop:
    """An event loop that runs when a test says so."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.soon: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self.later: deque[tuple[float, Callable[..., object], tuple[Any, ...]]] = deque()

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        self.soon.append((callback, args))

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        self.later.append((time.monotonic() + delay, callback, args))

    def _set(self, fd: int, event: int, callback: Callable[..., object] | None) -> None:
        try:
            callbacks = dict(self.selector.unregister(fd).data)
        except KeyError:
            callbacks = {}
        callbacks.pop(event, None)
        if callback is not None:
            callbacks[event] = callback
        if callbacks:
            self.selector.register(fd, sum(callbacks), callbacks)

    def add_reader(self, fd: int, callback: Callable[..., object]) -> None:
        self._set(fd, selectors.EVENT_READ, callback)

    def remove_reader(self, fd: int) -> None:
        self._set(fd, selectors.EVENT_READ, None)

    def add_writer(self, fd: int, callback: Callable[..., object]) -> None:
        self._set(fd, selectors.EVENT_WRITE, callback)

    def remove_writer(self, fd: int) -> None:
        self._set(fd, selectors.EVENT_WRITE, None)

    def turn(self, timeout_s: float = 0.0) -> None:
        """One iteration."""
        while self.later and self.later[0][0] <= time.monotonic():
            self.soon.append(self.later.popleft()[1:])
        while self.soon:
            callback, args = self.soon.popleft()
            callback(*args)
        for key, events in self.selector.select(timeout_s):
            for event, callback in list(key.data.items()):
                if events & event:
                    callback()

    def until(self, condition: Callable[[], object]) -> None:
        """Run until the condition holds."""
        ends = time.monotonic() + START_S
        while not condition():
            assert time.monotonic() < ends, "nothing happened"
            self.turn(0.01)


class KeptResults:
    """Results by entry; no entry may have two."""

    def __init__(self) -> None:
        self.by_entry: dict[int, Result] = {}

    def put(self, results: Sequence[Result]) -> None:
        for result in results:
            assert result.entry_id not in self.by_entry
            self.by_entry[result.entry_id] = result

    deliver = put

    def error(self, entry_id: int) -> InferpoolError:
        error = self.by_entry[entry_id].error
        assert error is not None
        return error

    def outputs(self, entry_id: int) -> Tensors:
        result = self.by_entry[entry_id]
        assert result.error is None, result.error
        assert result.outputs is not None
        return result.outputs


class HandInbox:
    """Keeps the entries that an engine offers, in their order."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.cancelled: list[tuple[int, str]] = []
        self.refusal: InferpoolError | None = None
        self.changed = threading.Condition()

    def offer(self, entry: Entry) -> None:
        with self.changed:
            if self.refusal is not None:
                raise self.refusal
            self.entries[entry.id] = entry
            self.changed.notify_all()

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        raise AssertionError("the web process does not ask")

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        with self.changed:
            self.cancelled.append((entry_id & 0xFFFFFFFFFF, reason))
            self.changed.notify_all()

    def wait(self, count: int) -> list[Entry]:
        """The entries, when there are `count`."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.entries) >= count, START_S)
            assert len(self.entries) == count
            return list(self.entries.values())

    def take(self, web_id: int) -> Entry:
        """The entry that has this id in its web process; it is no longer kept."""
        with self.changed:
            assert self.changed.wait_for(lambda: web_id in self.ids(), START_S)
            return self.entries.pop(next(each for each in self.entries if each & 0xFFFFFFFFFF == web_id))

    def ids(self) -> list[int]:
        """The ids of the entries in their web process."""
        return [each & 0xFFFFFFFFFF for each in self.entries]


class Engine:
    """An engine with a port and an inbox, in this process."""

    def __init__(
        self, reply: Callable[[Any], object] = lambda question: question, *, most_unread_bytes: int = 64 * MIB
    ) -> None:
        self.inbox = HandInbox()
        self.port = EnginePort(time.monotonic, most_unread_bytes)
        self.port.start(self.inbox, reply)
        OPEN.append(self)

    def close(self) -> None:
        """End the port; all that it has to send must be sent in time."""
        if self in OPEN:
            OPEN.remove(self)
            assert self.port.close()

    def answer(
        self, entry: Entry, outputs: Tensors | None = None, error: InferpoolError | None = None
    ) -> None:
        """Answer an entry, by default with its inputs."""
        if outputs is None and error is None:
            outputs = {name: tensor.copy() for name, tensor in entry.inputs.items()}
        self.port.put([Result(entry.id, outputs, error, 0.5, 0.25, 7)])

    def run(self, entry: Entry) -> None:
        """Mark an entry as running, as an instance does."""
        assert entry.mark is not None
        entry.mark[entry.mark_at] = 1


class Web:
    """A web process's client, and what it was told."""

    def __init__(
        self, number: int = 0, arena_bytes: int = 16 * MIB, most_entries: int = MOST_ENTRIES
    ) -> None:
        self.number = number
        self.loop = HandLoop()
        self.results = KeptResults()
        self.lost: list[tuple[int, str]] = []
        self.routes: dict[VersionKey, Sequence[EngineClient]] | None = None
        self.client = EngineClient(
            self.results,
            self.loop,
            time.monotonic,
            number,
            lambda epoch, why: self.lost.append((epoch, why)),
            lambda: self.loop.call_soon(self.route),
            most_entries,
        )
        self.arena = make_arena(arena_bytes)
        self.epoch = 0
        OPEN.append(self)

    def close(self) -> None:
        """Close the channel and the arena."""
        if self in OPEN:
            OPEN.remove(self)
            self.client.close()
            self.loop.selector.close()
            os.close(self.arena)

    def route(self) -> None:
        """Tell the client where versions are: with itself, or as `routes` says."""
        self.client.reroute({KEY: [self.client]} if self.routes is None else self.routes)

    def attach(self, engine: Engine) -> None:
        """Join the client and an engine."""
        channel, other = socket.socketpair()
        self.epoch += 1
        engine.port.connect(self.number, self.epoch, other, os.dup(self.arena))
        self.client.attach(self.epoch, channel, os.dup(self.arena))

    def attach_socket(self) -> socket.socket:
        """Attach the client; the test holds the engine's end."""
        channel, other = socket.socketpair()
        self.epoch += 1
        self.client.attach(self.epoch, channel, os.dup(self.arena))
        return other

    def crash(self, engine: Engine) -> Suspects:
        """End an engine at once: what its runs still answer arrives nowhere."""
        engine.port.disconnect(self.number)
        self.loop.until(lambda: self.lost and self.lost[-1][0] == self.epoch)
        return self.client.detach(self.epoch)

    @property
    def used(self) -> int:
        """Bytes of blocks that are in use."""
        arena = self.client._blocks.arena
        assert arena is not None
        return arena.used

    def until(self, *entry_ids: int) -> None:
        """Run until these entries have results."""
        self.loop.until(lambda: all(each in self.results.by_entry for each in entry_ids))


def entry_of(entry_id: int, inputs: Tensors, rows: int = 1, **more: Any) -> Entry:
    """An entry that arrives now."""
    given = {"group": None, "nbytes": 8, "arrived": time.monotonic(), **more}
    return Entry(entry_id, KEY, inputs, rows, **given)


def floats(*shape: int) -> Any:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def receive_floats(web: Web, tensor: Any, tensors_at: int = 0) -> memoryview:
    """Memory of the arena with the body that ends with a tensor."""
    memory = web.client.lend(tensors_at + tensor.nbytes, tensors_at)
    assert memory is not None
    memory[tensors_at:] = tensor.tobytes()
    return memory


def view_of(body: memoryview, tensor: Any, tensors_at: int = 0) -> Any:
    return np.frombuffer(body, tensor.dtype, offset=tensors_at).reshape(tensor.shape)
