"""A server whose memory the kernel limits, in a cgroup that the test makes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.server import CHAOS, ROOT, Server

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


def missing() -> str:
    """Name the program that this machine lacks to limit the memory of a process, or return an empty text."""
    try:
        folder = _make_cgroup(2**28)
    except OSError as error:
        return f"a cgroup with a memory limit ({error.strerror}: {error.filename})"
    folder.rmdir()
    return ""


class LimitedServer(Server):
    """A server that the kernel kills if it takes more than `memory_bytes`, its cached files excluded."""

    def __init__(
        self,
        repository: Path,
        memory_bytes: int,
        flags: Sequence[str] = (),
        environ: Mapping[str, str] = {},
        python: str = sys.executable,
    ) -> None:
        """Run the server that is installed for the interpreter `python`."""
        self.cgroup = _make_cgroup(memory_bytes)
        own = {"INFERPOOL_LOG_FORMAT": "json", "PYTHONPATH": f"{ROOT}:{CHAOS}"}
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        serve = [python, "-m", "inferpool", "serve", str(repository), "--port", "0", *flags]
        self._start(["sh", "-c", enter, str(self.cgroup), *serve], {**own, **environ})

    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        name = "memory.oom_control" if _is_v1(self.cgroup) else "memory.events"
        words = dict(line.split() for line in (self.cgroup / name).read_text().splitlines())
        return int(words["oom_kill"])

    def peak_bytes(self) -> int:
        """The most memory that the cgroup has had, cached files included."""
        name = "memory.max_usage_in_bytes" if _is_v1(self.cgroup) else "memory.peak"
        return int((self.cgroup / name).read_text())

    def held_bytes(self) -> int:
        """The anonymous memory of the server."""
        return self.status_bytes("RssAnon")

    @contextlib.contextmanager
    def squeezed(self, room_bytes: int) -> Iterator[None]:
        """Leave the server so many bytes more than it has now, files in the cache included."""
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, usage = names if _is_v1(self.cgroup) else ("memory.max", "memory.current")
        before = (self.cgroup / limit).read_text()
        (self.cgroup / limit).write_text(str(int((self.cgroup / usage).read_text()) + room_bytes))
        try:
            yield
        finally:
            (self.cgroup / limit).write_text(before)

    @contextlib.contextmanager
    def beside(self, memory_bytes: int) -> Iterator[None]:
        """Run a process in the cgroup that holds so much memory besides its own."""
        hold = (
            "import mmap, sys; held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE);"
            " held[:: mmap.PAGESIZE] = bytes(len(range(0, len(held), mmap.PAGESIZE)));"
            " print(flush=True); sys.stdin.read()"
        )
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", enter, str(self.cgroup), sys.executable, "-S", "-c", hold, str(memory_bytes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield
            process.communicate()

    def kill(self) -> None:
        """End the server and remove its cgroup."""
        super().kill()
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.cgroup.rmdir()
                return
            time.sleep(0.05)  # the kernel has not yet noticed the end of the process


def _is_v1(folder: Path) -> bool:
    return (folder / "memory.limit_in_bytes").exists()


def _make_cgroup(memory_bytes: int) -> Path:
    """A new cgroup with this limit; raises OSError if this user or system cannot have one."""
    parent = V1 if (V1 / "memory.limit_in_bytes").exists() else V2
    folder = parent / f"inferpool-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (folder / name).exists():
                (folder / name).write_text(str(memory_bytes))
                break
        else:
            raise FileNotFoundError(2, "the memory controller is not delegated", str(folder))
        for name in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            with contextlib.suppress(OSError):
                (folder / name).write_text(str(memory_bytes) if "memsw" in name else "0")
    except OSError:
        folder.rmdir()
        raise
    return folder
