"""The attacks: each function sends its worst once, and ends when the server has answered or hung up."""

from __future__ import annotations

import contextlib
import io
import random
import socket
import time
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from tests.http.predict.costly_bodies import (
    DIGITS,
    DIGITS_V2,
    JSON_CASES,
    NPY,
    Costly,
    costly_file,
    costly_json,
    zipped,
)

Attack = Callable[[int], None]
"""A function that attacks the server at a port of this machine."""

ROWS = 900_000
"""Rows of digits in the largest request: its answer has 300 MB of JSON."""
PATIENCE_S = 20.0
"""How long an attacker waits for an answer, or leaves one unread."""
TIMES = 4
"""How many copies of a costly request are sent at once."""
FILES = ("directory", "pictures", "chunks", "form")
RETRIES = 20


@cache
def many_rows() -> bytes:
    """Return a compressed npy file of a million rows of digits, of a hundredth of its size."""
    file = io.BytesIO()
    np.save(file, np.zeros((ROWS, 1, 8, 8), np.uint8))
    return zipped(file.getvalue())


@cache
def costly(name: str) -> Costly:
    """Return a costly body by its name."""
    return costly_json(name) if name in JSON_CASES else costly_file(name)


def head(path: str, size: int, headers: Mapping[str, str] = {}) -> bytes:
    """Return the head of a POST request with a body of `size` bytes."""
    fields = {"host": "x", "content-length": str(size), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode()


def connect(port: int) -> socket.socket:
    """Return a connection from one of several addresses of this machine, other than that of good clients."""
    connection = socket.socket()
    try:
        connection.settimeout(PATIENCE_S)
        connection.bind((f"127.0.0.{random.randrange(2, 6)}", 0))
        connection.connect(("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    return connection


def read_some(connection: socket.socket) -> None:
    """Read the beginning of a response, and drop the rest."""
    with contextlib.suppress(OSError):
        connection.recv(65536)


def send_at_once(port: int, path: str, body: bytes, headers: Mapping[str, str], times: int) -> None:
    """Send a request on `times` connections, then wait for the answers."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in range(times)]
        for connection in connections:
            connection.sendall(head(path, len(body), headers) + body)
        for connection in connections:
            read_some(connection)


def costly_attack(name: str) -> Attack:
    """Return the attack that sends a costly body several times at once."""

    def attack(port: int) -> None:
        request = costly(name)
        send_at_once(port, request.path, request.body, request.headers, max(TIMES, request.times))

    return attack


def rows_attack(port: int) -> None:
    """Ask for an answer of 300 MB, and for some of 3 MB."""
    send_at_once(port, DIGITS, many_rows(), NPY, 2)
    body = np.zeros((10_000, 1, 8, 8), np.float32)
    file = io.BytesIO()
    np.save(file, body)
    send_at_once(port, DIGITS, file.getvalue(), {"content-type": "application/x-npy"}, TIMES)


def classes_attack(port: int) -> None:
    """Ask /v2 for all classes of 50,000 rows, as strings."""
    rows = 50_000
    json_part = (
        b'{"inputs":[{"name":"image","datatype":"FP32","shape":[%d,1,8,8],'
        b'"parameters":{"binary_data_size":%d}}],'
        b'"outputs":[{"name":"logits","parameters":{"classification":10}}]}' % (rows, 256 * rows)
    )
    headers = {"inference-header-content-length": str(len(json_part))}
    send_at_once(port, DIGITS_V2, json_part + bytes(256 * rows), headers, 2)


def text_attack(port: int) -> None:
    """Send a text of 50 kB to a model that answers with a number for each token and word."""
    body = b"the object is " * 3500
    send_at_once(port, "/predict/next-word", body, {"content-type": "text/plain"}, TIMES)


def deaf_attack(port: int) -> None:
    """Leave large answers unread."""
    file = io.BytesIO()
    np.save(file, np.zeros((40_000, 1, 8, 8), np.float32))
    body = file.getvalue()
    deaf = []
    with contextlib.ExitStack() as stack:
        for _ in range(TIMES):
            connection = stack.enter_context(connect(port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(DIGITS, len(body), {"content-type": "application/x-npy"}) + body)
            deaf.append(connection)
        time.sleep(PATIENCE_S / 4)


def retry_attack(port: int) -> None:
    """Send 600 kB for a model that is not there, again and again."""
    for _ in range(RETRIES):
        send_at_once(port, "/predict/nobody", b"x" * 600_000, {}, TIMES)


def heads_attack(port: int) -> None:
    """Send heads that are none, too large, or never end, behind good requests."""
    good = head(DIGITS, 2) + b"{}"
    for bad in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 20_000,
    ):
        with connect(port) as connection:
            connection.sendall(5 * good + bad)
            read_some(connection)


def upgrade_attack(port: int) -> None:
    """Ask to upgrade, and hang up in the middle of bodies."""
    with connect(port) as connection:
        connection.sendall(4 * head(DIGITS, 2) + head(DIGITS, 2, {"connection": "upgrade", "upgrade": "h2c"}))
        read_some(connection)
    for size in (100, 10**6, 60 * 10**6):
        with connect(port) as connection:
            connection.sendall(head(DIGITS, size) + b"[" * (size // 2))


ATTACKS: dict[str, Attack] = {
    "rows": rows_attack,
    "classes": classes_attack,
    "text": text_attack,
    "deaf": deaf_attack,
    "retries": retry_attack,
    "heads": heads_attack,
    "upgrades": upgrade_attack,
    **{name: costly_attack(name) for name in ("lists", "objects", "depth", "null", "v2 names", *FILES)},
}


def attack_once(name: str, port: int) -> None:
    """Attack, whatever the server does to the connections."""
    with contextlib.suppress(OSError):
        ATTACKS[name](port)
