"""Looks at the processes of a server, from outside."""

from __future__ import annotations

from pathlib import Path

from tests.server import Server

WEB = "inferpool.web_process"
ENGINE = "inferpool.engine_process"
NAMES = {WEB: "inferpool-web", ENGINE: "inferpool-eng"}


def children(server: Server) -> list[int]:
    """The ids of the processes that the server has started and that live."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def find(server: Server, module: str) -> list[int]:
    """The ids of the processes of `module`, in the order of their starts. A spare engine is none."""
    return [pid for pid in children(server) if module.encode() in command(pid) and name(pid) == NAMES[module]]


def name(pid: int) -> str:
    """The name of a process, as `ps` shows it; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def command(pid: int) -> bytes:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def lives(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    return bool(command(pid))


def libraries(pid: int) -> set[str]:
    """The names of the native libraries of a process, and of their folders."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {part for line in lines if ".so" in line for part in line.split()[-1].split("/")}


def open_sockets(pid: int) -> int:
    """How many sockets a process has."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += str(descriptor.readlink()).startswith("socket:")
        except OSError:
            continue
    return count
