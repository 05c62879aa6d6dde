"""What the processes of a server hold: memory, descriptors and shared memory, as the kernel counts them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final, NamedTuple

from tests.engine.processes import ENGINE, WEB, children, find
from tests.server import Server, wait_until

MEMORY_FILE: Final = "/memfd:inferpool"
SPARE_NAME: Final = "inferpool-spare"
STEADY_S: Final = 0.3
"""Pause between two counts of descriptors that must be the same."""


class Census(NamedTuple):
    """Sums over the processes of each kind, by its name.

    Attributes:
        requests: how many requests had ended.
        processes: how many processes there are.
        pss: their memory in bytes, with their share of what they share.
        descriptors: their open descriptors, without those of the clients' connections.
        shared: bytes of the memory that processes share to pass tensors and metrics.
    """

    requests: int
    processes: dict[str, int]
    pss: dict[str, int]
    descriptors: dict[str, int]
    shared: int


def take_census(server: Server, requests: int) -> Census:
    """Count what the processes of `server` hold, once it is ready and idle."""
    wait_until(lambda: server.get("/health/ready").status_code == 200, "the server is ready")
    counts = [_count(server, requests)]

    def is_steady() -> bool:
        time.sleep(STEADY_S)
        # A process that has just started has the name of its program, and is none of the kinds yet. It must
        # have its own before it is counted: a count without it has the supervisor's descriptors for it.
        known = all(_name(pid).startswith("inferpool-") for pid in children(server))
        counts.append(_count(server, requests))
        return known and counts[-1].descriptors == counts[-2].descriptors

    wait_until(is_steady, "the number of descriptors is steady")
    return counts[-1]


def _count(server: Server, requests: int) -> Census:
    kinds = {
        "supervisor": [server.process.pid],
        "web processes": find(server, WEB),
        "engines": find(server, ENGINE),
        "spare engines": [pid for pid in children(server) if _name(pid) == SPARE_NAME],
    }
    return Census(
        requests,
        {kind: len(pids) for kind, pids in kinds.items()},
        {kind: sum(map(_pss, pids)) for kind, pids in kinds.items()},
        {kind: sum(map(_descriptors, pids)) for kind, pids in kinds.items()},
        sum(_memory_files(server.process.pid).values()),
    )


def client_ports(web: int) -> set[int]:
    """The ports of the clients that are connected to a web process."""
    return set(_clients(web))


def memory_files(pid: int) -> set[int]:
    """The inodes of the shared memory that a process has a descriptor of."""
    return set(_memory_files(pid))


def holders(inodes: set[int]) -> list[int]:
    """The ids of the processes that have a descriptor of this shared memory, or have mapped it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            mapped = {
                int(fields[4])
                for line in (folder / "maps").read_text().splitlines()
                if len(fields := line.split()) > 5 and fields[5].startswith(MEMORY_FILE)
            }
            if inodes & (mapped | memory_files(pid)):
                found.append(pid)
        except OSError:  # it has ended
            continue
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""


def _clients(pid: int) -> list[int]:
    inodes = {
        target[8:-1]
        for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        if (target := _target(descriptor)).startswith("socket:[")
    }
    fields = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    # The state 0A is a listener.
    return [int(each[2].rsplit(":", 1)[1], 16) for each in fields if each[9] in inodes and each[3] != "0A"]


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:  # it was closed, or its process has ended
        return ""


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def _descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) - len(_clients(pid))


def _memory_files(pid: int) -> dict[int, int]:
    """The bytes of shared memory by inode."""
    files = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if _target(descriptor).startswith(MEMORY_FILE):
            status = descriptor.stat()
            files[status.st_ino] = 512 * status.st_blocks
    return files
