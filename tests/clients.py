"""Many light HTTP/1.1 clients at once: each has one connection and sends one request after the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple


class Reply(NamedTuple):
    """A response; the names in `headers` are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        """Connect to a server on this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, path: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
        """Send a POST request without waiting for the response."""
        fields = {"host": "localhost", "content-length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def receive(self) -> Reply:
        """Read the next response; raises IncompleteReadError or ConnectionError if there is none."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return Reply(int(head[0].split(" ", 2)[1]), headers, body)

    async def post(self, path: str, body: bytes, headers: Mapping[str, str] = {}) -> Reply:
        """Send a POST request and read the response."""
        self.send(path, body, headers)
        return await self.receive()

    @property
    def port(self) -> int:
        """The client's own port."""
        port: int = self._writer.get_extra_info("sockname")[1]
        return port

    def send_part(self, path: str, body: bytes, headers: Mapping[str, str], count: int) -> None:
        """Send only `count` bytes of the body that the head announces."""
        self.send(path, body[:count], {**headers, "content-length": str(len(body))})

    def send_rest(self, rest: bytes) -> None:
        """Send what `send_part` has left out."""
        self._writer.write(rest)

    async def finish(self) -> bytes:
        """Ask the server to close the connection; returns what came in place of a close, or after it.

        Nothing comes if each request has been answered once.
        """
        self.send("/none", b"", {"connection": "close"})
        await self.receive()
        return await self._reader.read()

    async def close(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def with_clients(port: int, count: int, work: Callable[[Client, int], Awaitable[None]]) -> None:
    """Run `work(client, number)` for `count` clients at the same time."""

    async def one(number: int) -> None:
        client = await Client.connect(port)
        try:
            await work(client, number)
        finally:
            await client.close()

    await asyncio.gather(*(one(number) for number in range(count)))
