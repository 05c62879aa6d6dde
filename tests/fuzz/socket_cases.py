"""Checks of `_socketio`: every byte arrives once and in order, for all descriptors and arguments."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

NO_DESCRIPTOR = 2**30
"""No process may have so many descriptors, so this one is never open."""


@contextlib.contextmanager
def socket_pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connected pairs of non-blocking sockets."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(count):
            near, far = socket.socketpair()
            for end in (near, far):
                stack.enter_context(end)
                end.setblocking(False)
            pairs.append((near, far))
        yield pairs


def check_receive(module: ModuleType, chance: random.Random) -> None:
    """Send random bytes to random sockets; read until each has all of them, and its end."""
    with contextlib.ExitStack() as stack:
        pairs = stack.enter_context(socket_pairs(chance.choice((0, 1, 3, 20, 70))))
        poll = stack.enter_context(select.epoll())
        sent: dict[int, bytes] = {}
        for near, far in pairs:
            poll.register(near.fileno(), select.EPOLLIN)
            data = chance.randbytes(chance.choice((0, 1, 50, 3000)))
            far.sendall(data)
            sent[near.fileno()] = data
            if chance.random() < 0.7:
                far.close()
        reader, writer = os.pipe()  # readable, but no socket
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        os.write(writer, b"x")
        pipe = chance.random() < 0.3
        if pipe:
            poll.register(reader, select.EPOLLIN)
        closed = {near.fileno() for near, far in pairs if far.fileno() < 0}
        read = dict.fromkeys(sent, b"")
        ended: set[int] = set()
        while read != sent or not closed <= ended:
            buffer = bytearray(chance.randrange(1, 5000))
            most = chance.randrange(1, len(buffer) + 1)
            found = module.receive(poll.fileno(), buffer, most)
            assert len(found) <= min(64, len(buffer) // most)
            assert len(dict(found)) == len(found), "each descriptor once"
            for descriptor, data in found:
                if descriptor == reader:
                    assert pipe
                    assert data is None
                    poll.unregister(reader)
                elif data is None:
                    ended.add(descriptor)
                    assert descriptor in closed
                    assert read[descriptor] == sent[descriptor], "the end comes after all bytes"
                    poll.unregister(descriptor)
                else:
                    assert 0 < len(data) <= most
                    read[descriptor] += data
        assert ended == closed


def check_send(module: ModuleType, chance: random.Random) -> None:
    """Send to open, full, closed and impossible descriptors; each peer gets what the socket took."""
    with contextlib.ExitStack() as stack:
        pairs = stack.enter_context(socket_pairs(chance.choice((0, 1, 3, 40))))
        file = stack.enter_context(Path(os.devnull).open("wb"))  # a descriptor that is no socket
        descriptors, bodies = [], []
        for near, far in pairs:
            if chance.random() < 0.1:
                far.close()
            descriptors.append(near.fileno())
            bodies.append(chance.randbytes(chance.choice((0, 1, 100, 300_000))))
            if chance.random() < 0.1:
                descriptors.append(chance.choice((NO_DESCRIPTOR, file.fileno())))
                bodies.append(b"lost")
        lists = list(descriptors), list(bodies)
        changing = None
        if chance.random() < 0.1:
            changing = threading.Thread(target=lambda: [own.clear() for own in lists])
            changing.start()
        try:
            taken = module.send_all(*lists)
        except TypeError:
            assert changing is not None, "the lists differ in length only if another thread empties them"
            taken = []
        if changing is not None:
            changing.join()
        by_descriptor = {near.fileno(): far for near, far in pairs}
        assert len(taken) in (0, len(descriptors))
        for descriptor, body, size in zip(descriptors[: len(taken)], bodies, taken, strict=False):
            peer = by_descriptor.get(descriptor)
            if peer is None or peer.fileno() < 0:
                assert size == 0
                continue
            came = bytearray()
            while len(came) < size:
                came += peer.recv(1 << 20)
            assert came == body[:size]
            with contextlib.suppress(BlockingIOError):
                assert not peer.recv(1), "no more than was said"


class Emptying:
    """An integer that empties a list when it is asked for its value."""

    def __init__(self, value: int, victim: list[object]) -> None:
        self._value = value
        self._victim = victim

    def __index__(self) -> int:
        self._victim.clear()
        return self._value


def check_odd_arguments(module: ModuleType, chance: random.Random) -> None:
    """Call each function with arguments that it must refuse, or at the limit of what it takes."""
    odd: list[object] = [
        None, True, -1, 0.5, NO_DESCRIPTOR, 2**31 - 1, 2**31, 2**63, -(2**63), 2**200, "x", b"", [], [b"x"],
        bytearray(), bytearray(9), memoryview(bytearray(9)), Emptying(NO_DESCRIPTOR, []),
    ]  # fmt: skip
    with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):
        module.receive(*(chance.choice(odd) for _ in range(chance.choice((0, 1, 3, 3, 3, 3, 4)))))
    with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):
        module.receive(NO_DESCRIPTOR, bytearray(chance.randrange(4)), chance.choice((0, -1, 1, 4, 2**63)))
    sockets: list[object] = [NO_DESCRIPTOR] * chance.randrange(4)
    bodies: list[object] = [bytes(5) for _ in sockets]
    for chosen in (sockets, bodies):
        if chosen and chance.random() < 0.5:
            chosen[chance.randrange(len(chosen))] = chance.choice(odd)
    if sockets and chance.random() < 0.3:
        sockets[0] = Emptying(NO_DESCRIPTOR, chance.choice((sockets, bodies)))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        assert not any(module.send_all(sockets, bodies))
