"""Sends as many small predictions as one thread can, and checks every answer.

Each connection has one request under way at a time. All are sent before the first answer is read, so that the
server has many at once. A thread of this client takes about 20 µs of CPU for a request and its answer.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

CONNECTIONS: Final = 32
_ANSWER: Final = re.compile(
    rb'HTTP/1\.1 200 .*\r\n\r\n\{.*"version": ?"(\d+)".*"y": ?\[\[(\d+)(?:\.0)?, ?(\d+)(?:\.0)?\]\]',
    re.DOTALL,
)
_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_MOST_FAULTS: Final = 10
_PERIOD: Final = 1_000_000
"""Rows come again after so many requests, and numbers stay exact in FP32."""
_READ_BYTES: Final = 65_536
_WAIT_S: Final = 60.0


@dataclass
class Answers:
    """What came of the requests.

    Attributes:
        requests: how many were answered.
        versions: how many answers each version gave.
        faults: what was wrong, at most a few.
        longest_s: the longest time from the sending of a round to the last answer of the round.
    """

    requests: int = 0
    versions: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def ask_until(
    port: int, model: str, over: Callable[[], bool], answers: Answers, pause_s: float = 0.0
) -> None:
    """Send requests until `over`. The version V of `model` answers x + V to a row x.

    The client pauses for `pause_s` between two rounds.
    """
    connections = [socket.create_connection(("127.0.0.1", port), _WAIT_S) for _ in range(CONNECTIONS)]
    head = f"POST /predict/{model} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n".encode()
    number = 0
    try:
        while not over():
            began = time.monotonic()
            rows = []
            for index, connection in enumerate(connections):
                number = (number + 1) % _PERIOD
                body = b'{"inputs":[[%d,%d]]}' % (index, number)
                connection.sendall(b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
                rows.append((index, number))
            for connection, row in zip(connections, rows, strict=True):
                reply = _receive(connection)
                found = _ANSWER.fullmatch(reply.rstrip(b"}"))
                version = int(found[1]) if found is not None else 0
                expected = (row[0] + version, row[1] + version)
                is_wrong = found is None or (int(found[2]), int(found[3])) != expected
                if is_wrong and len(answers.faults) < _MOST_FAULTS:
                    answers.faults.append(f"{row} was answered {reply[:500]!r}")
                answers.versions[version] += 1
            answers.requests += len(connections)
            answers.longest_s = max(answers.longest_s, time.monotonic() - began)
            if pause_s:
                time.sleep(pause_s)
    except OSError as error:
        answers.faults.append(f"a connection has ended: {error!r}")
    finally:
        for connection in connections:
            connection.close()


def _receive(connection: socket.socket) -> bytes:
    """One whole answer; raises OSError if the connection ends before."""
    reply = connection.recv(_READ_BYTES)
    while True:
        length = _LENGTH.search(reply)
        end = reply.find(b"\r\n\r\n")
        if length is not None and 0 <= end <= len(reply) - 4 - int(length[1]):
            return reply
        more = connection.recv(_READ_BYTES)
        if not more:
            raise ConnectionError(
                f"the server has closed it after {json.dumps(reply.decode('latin-1'))[:300]}"
            )
        reply += more
