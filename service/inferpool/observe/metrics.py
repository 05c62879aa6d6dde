"""All metrics: the counts of this process, and the sums over all processes.

Metrics may cost a request one microsecond. So the values are plain numbers, without locks and without
label look-ups. Each value has one writer at a time: the event loop writes the values of requests, the pool
writes those of batches under its lock. A writer looks a value up once per version and keeps it.

A server of several processes has its values in shared memory too (`observe.regions`). A value then writes
each change there, and a scrape of any web process shows the sums of all processes (`observe.metrics_page`).
Each process also writes there, once a second, the values that its sources read at a scrape.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from inferpool.observe.families import CPU_SECONDS, FAMILIES, HIDDEN, USUAL_STATUSES, Combine, Family
from inferpool.observe.prometheus_text import Exemplar
from inferpool.observe.regions import RegionReader, Regions
from inferpool.system.cpu_pace import let_others_run

log = logging.getLogger(__name__)

STALE_S: Final = 5.0
"""Age at which the gauges of a process that no longer writes them are left out, in seconds."""

PIECE_NUMBERS: Final = 400
"""Numbers of a page of metrics that are read or written in one piece, in less than a millisecond."""

PIECE_PAUSE_S: Final = 0.005
"""The longest pause after a piece, in seconds, so that a server at its CPU quota is scraped in time, too."""

SAMPLE_NUMBERS: Final = 4
"""A number of a source takes about as long as so many others."""

ABSENT: Final = math.nan
"""The number of a gauge in shared memory that its source no longer has."""


class Value:
    """A number with one writer at a time, which any thread may read.

    Attributes:
        value: the number.
        shared: where other processes see the number; None if no other process does.
    """

    __slots__ = ("shared", "value")

    def __init__(self, shared: memoryview[float] | None = None) -> None:
        """Go on from the number in `shared`, which a predecessor of this process left there."""
        self.shared = shared
        self.value = 0.0 if shared is None else counted(shared[0])

    def add(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        value = self.value + amount
        self.value = value
        shared = self.shared
        if shared is not None:
            shared[0] = value


class Distribution:
    """A histogram with one writer at a time, which any thread may read.

    Attributes:
        bounds: the upper bounds of its buckets.
        counts: how many amounts each bucket has; the last one has those above all bounds.
        sum: the sum of all amounts.
        exemplars: exemplars by the index of their bucket.
        shared: where other processes see the counts and then the sum; None if no other process does.
    """

    __slots__ = ("_last", "bounds", "counts", "exemplars", "shared", "sum")

    def __init__(self, bounds: tuple[float, ...], shared: memoryview[float] | None = None) -> None:
        """Go on from the numbers in `shared`, which a predecessor of this process left there."""
        self.bounds = bounds
        self._last = 0
        self.shared = shared
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        if shared is not None:
            *counts, total = [counted(number) for number in shared]
            self.counts = [int(count) for count in counts]
            self.sum = total
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, amount: float) -> None:
        """Count `amount` in the first bucket whose upper bound is not below it."""
        # Most amounts are in the bucket of the last one, and finding that out takes less than a search.
        index = self._last
        bounds = self.bounds
        if not (amount <= bounds[index] and (not index or bounds[index - 1] < amount)):
            index = bisect_left(bounds, amount)
            self._last = min(index, len(bounds) - 1)
        count = self.counts[index] + 1
        self.counts[index] = count
        self.sum += amount
        shared = self.shared
        if shared is not None:
            shared[index] = count
            shared[-1] = self.sum

    def exemplify(self, exemplar: Exemplar) -> None:
        """Attach `exemplar`, whose amount was observed, to its bucket in place of the previous one."""
        self.exemplars[bisect_left(self.bounds, exemplar.amount)] = exemplar


Labels = tuple[str, ...]
"""The label values of a series."""

_Number = TypeVar("_Number", float, list[float])

Sample = tuple[str, Labels, float]
"""A gauge that a source reads at scrape time: the family's name, its label values, the number."""


def rest_briefly() -> None:
    """Let other threads run, as after a piece of a page of metrics."""
    let_others_run(PIECE_PAUSE_S)


class Rests:
    """Lets other threads run after each piece of the work on a page of metrics.

    The page of many versions takes tens of milliseconds of a thread, which holds the GIL while it runs
    compiled code, and predictions would wait for that.
    """

    def __init__(self, rest: Callable[[], None] = rest_briefly) -> None:
        """Call `rest` after each piece."""
        self._rest = rest
        self._left = PIECE_NUMBERS

    def after(self, numbers: int) -> None:
        """Rest if what was done since the last rest, with these `numbers`, is a piece."""
        self._left -= numbers
        if self._left <= 0:
            self._left = PIECE_NUMBERS
            self._rest()


class Metrics:
    """The metrics of a server, or of one of its processes.

    Attributes:
        info: the labels of `build_info`; engines know the versions of the runtimes.
    """

    def __init__(self, info: dict[str, str], regions: Regions | None = None) -> None:
        """Start without values.

        `regions` has the metrics of the other processes of the server, and takes those of this one; None if
        this process is the server.
        """
        self._lock = threading.Lock()
        self._regions = regions
        self._values: dict[str, dict[Labels, Value]] = {}
        self._distributions: dict[str, dict[Labels, Distribution]] = {}
        self._sources: list[Callable[[], Iterable[Sample]]] = []
        self._published_sources: list[Callable[[], Iterable[Sample]]] = []
        self._published: dict[tuple[str, Labels], memoryview[float]] = {}
        self._local: dict[str, dict[Labels, memoryview[float]]] = {}
        self._is_shown: Callable[[str, str], bool] | None = None
        self.info = info
        self._cpu_base = 0.0
        self._cpu_s = 0.0
        self._publishing = threading.Lock()
        if regions is not None:
            self._cpu_base = self.left_behind(CPU_SECONDS)
            self._take_over(regions)

    def value(self, name: str, *labels: str) -> Value:
        """The counter of family `name` with these label values, created at the first call."""
        _family(name, labels)
        with self._lock:
            series = self._values.setdefault(name, {})
            if labels not in series:
                series[labels] = Value(self._shared(name, labels, 1))
            return series[labels]

    def distribution(self, name: str, *labels: str) -> Distribution:
        """The histogram of family `name` with these label values, created at the first call."""
        family = _family(name, labels)
        with self._lock:
            series = self._distributions.setdefault(name, {})
            if labels not in series:
                series[labels] = Distribution(family.bounds, self._shared(name, labels, family.cells))
            return series[labels]

    @property
    def is_shared(self) -> bool:
        """Whether this process is one of several, which see one another's metrics."""
        return self._regions is not None

    def hidden(self, name: str, *labels: str) -> memoryview[float] | None:
        """The shared numbers of a series of `HIDDEN`; None if no other process sees them.

        Only the caller writes them. They begin as a predecessor of this process left them.
        """
        with self._lock:
            return self._shared(name, labels, HIDDEN[name])

    def cells(self, name: str, *labels: str) -> memoryview[float]:
        """The numbers of a series of `HIDDEN`, whether other processes see them or not.

        Only the caller writes them. `hidden_series` reads them.
        """
        with self._lock:
            found = self._shared(name, labels, HIDDEN[name])
            if found is None:
                series = self._local.setdefault(name, {})
                if labels not in series:
                    series[labels] = memoryview(bytearray(8 * HIDDEN[name])).cast("d")
                found = series[labels]
        return found

    def show_only(self, is_shown: Callable[[str, str], bool]) -> None:
        """Export no series of a model and version for which `is_shown` is False.

        The version is "" if a series is one of the whole model.
        """
        self._is_shown = is_shown

    def hidden_series(self, name: str, *labels: str) -> dict[Labels, list[list[float]]]:
        """What all processes wrote of the series of `HIDDEN` whose first label values are `labels`.

        By label values: the numbers of each process.
        """
        regions = self._regions
        with self._lock:
            every = [dict(self._local.get(name, {}))]
            if regions is not None:
                every.append(dict(regions.own.series(name)))
        every += [dict(reader.series(name)) for reader in self._refreshed()]
        found: dict[Labels, list[list[float]]] = {}
        for series in every:
            for values, numbers in series.items():
                if values[: len(labels)] == labels and len(numbers) == HIDDEN[name]:
                    found.setdefault(values, []).append([counted(number) for number in numbers])
        return found

    def total(self, name: str, *labels: str) -> list[float]:
        """The numbers of a counter or histogram, summed over all processes: the counts, then the sum."""
        family = _family(name, labels)
        numbers = [0.0] * family.cells
        if family.kind == "histogram":
            own = self._distributions.get(name, {}).get(labels)
            if own is not None:
                numbers = [*map(float, own.counts), own.sum]
        else:
            value = self._values.get(name, {}).get(labels)
            if value is not None:
                numbers = [value.value]
        for reader in self._refreshed():
            other = reader.series(name).get(labels)
            if other is not None and len(other) == len(numbers):
                numbers = [number + counted(more) for number, more in zip(numbers, other, strict=True)]
        return numbers

    def add_version(self, model: str, version: str) -> None:
        """Export the version's request counters and histograms with the value 0."""
        for status in USUAL_STATUSES:
            self.value("requests_total", model, version, status)
        self.value("server_errors_total", model, version)
        if self.is_shared:  # only an engine of its own can end and leave requests behind
            self.value("replayed_entries_total", model, version)
            self.value("crashed_entries_total", model, version)
        for family in FAMILIES.values():
            if family.kind == "histogram":
                self.distribution(family.name, model, version)

    def add_source(self, source: Callable[[], Iterable[Sample]], *, published: bool = True) -> None:
        """Call `source` for its gauges at each scrape, and each time they are published.

        `published` is False if each process that can be scraped has such a source of the whole server.
        """
        (self._published_sources if published else self._sources).append(source)

    def left_behind(self, name: str, *labels: str) -> float:
        """The number that this process's predecessor published for a series; 0.0 if there is none."""
        with self._lock:
            shared = self._shared(name, labels, 1)
        return 0.0 if shared is None else counted(shared[0])

    def publish(self) -> dict[str, dict[Labels, float]]:
        """Write the gauges of this process for the others, and return them by family and label values.

        May be called from any thread.
        """
        regions = self._regions
        if regions is None:
            return _read(self._published_sources)
        # The lock comes first, so that of two threads the later one publishes the later numbers.
        with self._publishing:
            samples = _read(self._published_sources)
            self._write(regions, samples)
        return samples

    def _write(self, regions: Regions, samples: Mapping[str, Mapping[Labels, float]]) -> None:
        with self._lock:
            self._cpu_s = self._cpu_base + time.process_time()
            cpu = self._shared(CPU_SECONDS, (), 1)
            if cpu is not None:
                cpu[0] = self._cpu_s
            for (name, labels), shared in self._published.items():
                if labels not in samples.get(name, {}):
                    shared[0] = ABSENT
            for name, series in samples.items():
                for labels, number in series.items():
                    shared_number = self._published.get((name, labels))
                    if shared_number is None:
                        shared_number = self._shared(name, labels, 1)
                        if shared_number is None:
                            continue
                        self._published[name, labels] = shared_number
                    shared_number[0] = number
            regions.own.beat(time.monotonic())

    def exemplars(self) -> dict[tuple[str, Labels], dict[int, Exemplar]]:
        """The exemplars of each histogram that has some, by family and label values."""
        with self._lock:
            return {
                (name, labels): dict(each.exemplars)
                for name, series in self._distributions.items()
                for labels, each in series.items()
                if each.exemplars
            }

    def figures(
        self, rests: Rests | None = None
    ) -> tuple[dict[str, dict[Labels, float]], dict[str, dict[Labels, list[float]]]]:
        """What the whole server exports now: counters and gauges, and histograms, by family and label values.

        A histogram is its counts, then its sum. May be called from any thread but that of an event loop: it
        takes `rests`.
        """
        if rests is None:
            rests = Rests()
        # What is shown is published first: a successor of this process must not begin below it. The sources
        # come before the counters, because they wait for the pools' locks: whoever has an answer finds it
        # counted.
        gauges = self.publish()
        gauges.update(_read(self._sources, rests))
        # Most slots have no process, and each family looks at all readers.
        readers = [reader for reader in self._refreshed() if reader.pid]
        now = time.monotonic()
        # Each version has dozens of series, and looks its model up once.
        shown: dict[tuple[str, str], bool] = {}
        numbers: dict[str, dict[Labels, float]] = {}
        histograms: dict[str, dict[Labels, list[float]]] = {}
        for name, family in FAMILIES.items():
            if family.kind == "histogram":
                with self._lock:
                    series = {
                        labels: [*map(float, each.counts), each.sum]
                        for labels, each in self._distributions.get(name, {}).items()
                    }
                for reader in readers:
                    rests.after(_add_histograms(series, reader.series(name), family.cells))
                histograms[name] = self._shown(family, series, shown)
                rests.after(len(series) * family.cells)
            else:
                with self._lock:
                    found = {labels: value.value for labels, value in self._values.get(name, {}).items()}
                found.update(gauges.get(name, {}))
                for reader in readers:
                    # A gauge tells how things are now, which nobody knows of a process that no longer runs.
                    if family.kind == "counter" or now - reader.beat < STALE_S:
                        _combine(found, reader.series(name), family)
                numbers[name] = self._shown(family, found, shown)
                rests.after(len(found))
        return numbers, histograms

    def _shown(
        self, family: Family, series: dict[Labels, _Number], known: dict[tuple[str, str], bool]
    ) -> dict[Labels, _Number]:
        """`series` without those of models and versions that there are no more; `known` has the others."""
        is_shown = self._is_shown
        if is_shown is None or not family.labels or family.labels[0] != "model":
            return series
        has_version = len(family.labels) > 1 and family.labels[1] == "version"
        found: dict[Labels, _Number] = {}
        for labels, number in series.items():
            key = (labels[0], labels[1] if has_version else "")
            if key not in known:
                known[key] = is_shown(key[0], key[1])
            if known[key]:
                found[labels] = number
        return found

    def _take_over(self, regions: Regions) -> None:
        """Go on with the counters and histograms that a predecessor of this process left behind."""
        for name, family in FAMILIES.items():
            for labels in list(regions.own.series(name)):
                if len(labels) == len(family.labels):
                    if family.kind == "histogram":
                        self.distribution(name, *labels)
                    elif family.kind == "counter":
                        self.value(name, *labels)

    def _refreshed(self) -> list[RegionReader]:
        """The readers of the other processes' regions, with all their series."""
        regions = self._regions
        if regions is None:
            return []
        with regions.lock:
            for reader in regions.others:
                reader.refresh()
        return regions.others

    def processes(self) -> tuple[list[int], float]:
        """The ids of the server's processes, and the CPU seconds of all that have ever run."""
        regions = self._regions
        assert regions is not None
        now = time.monotonic()
        pids, seconds = [regions.own.pid], self._cpu_s
        for reader in self._refreshed():
            if now - reader.beat < STALE_S:
                pids.append(reader.pid)
            for numbers in reader.series(CPU_SECONDS).values():
                seconds += counted(numbers[0])
        return pids, seconds

    def _shared(self, name: str, labels: Labels, count: int) -> memoryview[float] | None:
        """The numbers of a series in this process's region. The caller holds the lock."""
        regions = self._regions
        return None if regions is None else regions.own.numbers(name, labels, count)


def counted(number: float) -> float:
    """A number that was counted: `number`, or 0.0 if a damaged region has what cannot be a count."""
    return number if 0.0 <= number < math.inf else 0.0


def _add_histograms(
    series: dict[Labels, list[float]], others: Mapping[Labels, memoryview[float]], count: int
) -> int:
    """Add the histograms of another process to those in `series`; `count` is how many numbers one has.

    Returns how many numbers the other process has.
    """
    for labels, numbers in others.items():
        if len(numbers) == count:
            own = series.get(labels)
            # Number by number, because each is read as a whole.
            found = [counted(numbers[index]) for index in range(count)]
            series[labels] = found if own is None else [a + b for a, b in zip(own, found, strict=True)]
    return len(others) * count


def _combine(series: dict[Labels, float], others: Mapping[Labels, memoryview[float]], family: Family) -> None:
    """Add what another process has of `family` to `series`."""
    for labels, numbers in others.items():
        if len(numbers) != 1 or len(labels) != len(family.labels):
            continue
        number = numbers[0]
        if not math.isfinite(number) or (number < 0 and family.kind == "counter"):
            continue  # the region is damaged
        before = series.get(labels)
        if before is None:
            series[labels] = number
        else:
            series[labels] = _combined(before, number, family.combine)


def _combined(before: float, number: float, combine: Combine) -> float:
    if combine == "sum":
        return before + number
    return max(before, number) if combine == "max" else min(before, number)


def _read(
    sources: Iterable[Callable[[], Iterable[Sample]]], rests: Rests | None = None
) -> dict[str, dict[Labels, float]]:
    """What the `sources` say now, by family and label values; takes `rests` between two samples."""
    found: dict[str, dict[Labels, float]] = {}
    for source in sources:
        for name, labels, number in source():
            _family(name, labels)
            found.setdefault(name, {})[labels] = number
            if rests is not None:
                rests.after(SAMPLE_NUMBERS)
    return found


def _family(name: str, labels: Labels) -> Family:
    family = FAMILIES[name]
    if len(labels) != len(family.labels):
        raise ValueError(f"{name} has the labels {family.labels}, not {labels}")
    return family
