"""The metrics `process_*` and `python_*`, from `prometheus_client` or for all processes of a server."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Processes = Callable[[], tuple[list[int], float]]
"""Returns the ids of a server's processes, and the CPU seconds of all that have ever run."""

_PROC: Final = Path("/proc")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def process_registry(processes: Processes | None) -> CollectorRegistry:
    """The metrics of this process if `processes` is None, else those of all processes together."""
    registry = CollectorRegistry()
    PlatformCollector(registry=registry)
    if processes is None:
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
    else:
        registry.register(_ServerCollector(processes))
    return registry


class _Use(NamedTuple):
    """What a process uses: bytes of memory and of address space, descriptors, and when it began."""

    resident: int
    virtual: int
    files: int
    began: float


class _ServerCollector(Collector):
    """Sums the metrics of a process, with the names of `ProcessCollector`, over a server's processes."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._booted = _booted()

    def collect(self) -> Iterable[Metric]:
        """Read the processes in `/proc`; one that has just ended is left out."""
        pids, cpu_s = self._processes()
        uses: list[_Use] = []
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                uses.append(_use(_PROC / str(pid), self._booted))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield CounterMetricFamily(
            "process_cpu_seconds_total", "CPU time of all processes, in seconds.", value=cpu_s
        )
        for name, text, number in (
            ("virtual_memory_bytes", "Address space of all processes.", sum(use.virtual for use in uses)),
            (
                "resident_memory_bytes",
                "Memory of all processes; what several share counts once.",
                sum(use.resident for use in uses),
            ),
            ("open_fds", "Open file descriptors of all processes.", sum(use.files for use in uses)),
            ("max_fds", "Open file descriptors that one process may have.", limit),
            (
                "start_time_seconds",
                "Unix time at which the oldest process began.",
                min((use.began for use in uses), default=0.0),
            ),
        ):
            yield GaugeMetricFamily(f"process_{name}", text, value=number)


def _use(folder: Path, booted: float) -> _Use:
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return _Use(
        _resident(folder, int(fields[21])),
        int(fields[20]),
        sum(1 for _ in (folder / "fd").iterdir()),
        booted + int(fields[19]) / _TICKS,
    )


def _resident(folder: Path, pages: int) -> int:
    """The proportional set size, or where the kernel does not tell it the resident `pages`, in bytes."""
    with suppress(OSError):
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return pages * _PAGE


def _booted() -> float:
    """The Unix time at which the machine started; 0.0 if it does not tell."""
    with suppress(OSError):
        for line in (_PROC / "stat").read_text().splitlines():
            if line.startswith("btime "):
                return float(line.split()[1])
    return 0.0
