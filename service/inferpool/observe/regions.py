"""Metrics in memory that all processes of a server share, so that each can tell what all have counted.

The memory is one file without a name. It has a region for each *slot*: a place in the server that one process
at a time has, for example that of the first web process. A process maps the region of its slot for writing
and those of all others for reading, so that a process that goes wrong damages its own numbers only. A region
outlives the process: the next one in the slot goes on counting.

A region is a header and then records, which are only ever appended. A record names a series and has its
numbers, each 8 bytes long and aligned, which the processor reads and writes as a whole:

    header  magic 8s · end of the records u64 · process id u64 · moment of the last beat f64 · 32 spare bytes
    record  CRC-32 u32 · bytes of the name u16 · numbers u16 · name, padded to 8 bytes · numbers f64

The name is a JSON array: the metric and its label values. Readers check every field, whatever a process
wrote. Numbers are in the byte order of the machine, which does not matter between processes of one machine.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Final

log = logging.getLogger(__name__)

REGION_BYTES: Final = 8 * 2**20
"""Address space of a region, enough for 2,000 versions. Only the pages that are written take memory."""

MAGIC: Final = b"INFPMTR1"
_HEADER_BYTES: Final = 64
_RECORD: Final = struct.Struct("=IHH")
_MOST_TEXT: Final = 2**16 - 8
_END, _PID, _BEAT = 1, 2, 3
"""Indices of 8-byte words in the header."""

Labels = tuple[str, ...]


def make_regions(slots: int) -> int:
    """Make the memory for processes in `slots` slots, and return its descriptor, which children inherit."""
    file = os.memfd_create("inferpool-metrics", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, slots * REGION_BYTES)
    # A file that shrinks would kill every process that reads it.
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def read_beat(file: int, slot: int, pid: int) -> float:
    """The last beat of the process `pid` in `slot` of `file`; 0.0 if it has not beaten yet."""
    start = slot * REGION_BYTES + 8 * _PID
    found, beat = struct.unpack("=Qd", os.pread(file, 16, start))
    return beat if found == pid else 0.0


class Region:
    """The region of this process, to be written by one thread at a time.

    Attributes:
        pid: the id of this process.
    """

    def __init__(self, file: int, slot: int) -> None:
        """Map the region of `slot` in `file`, and go on with the numbers that a predecessor left there."""
        self._map = mmap.mmap(file, REGION_BYTES, offset=slot * REGION_BYTES)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._numbers = self._bytes.cast("d")
        self._series: dict[str, dict[Labels, memoryview[float]]] = {}
        self._full = False
        end = _HEADER_BYTES
        if bytes(self._bytes[: len(MAGIC)]) == MAGIC:
            for name, labels, start, count in records(self._bytes, end, self._words[_END]):
                self._series.setdefault(name, {})[labels] = self._numbers[start : start + count]
                end = 8 * (start + count)
        self._end = end
        self._numbers[_BEAT] = 0.0
        self.pid = self._words[_PID] = os.getpid()
        self._words[_END] = end
        # Last, because readers use the header once they see this.
        self._bytes[: len(MAGIC)] = MAGIC

    def numbers(self, name: str, labels: Labels, count: int) -> memoryview[float] | None:
        """The numbers of a series, which begin as 0.0; None if they do not fit, which is logged once."""
        known = self._series.setdefault(name, {}).get(labels)
        if known is None:
            known = self._append(name, labels, count)
        return known if known is not None and len(known) == count else None

    def series(self, name: str) -> Mapping[Labels, memoryview[float]]:
        """The series of the metric `name`, by label values; those of a predecessor are among them."""
        return self._series.get(name, {})

    def beat(self, now: float) -> None:
        """Tell the readers that this process lives at the moment `now` of the machine's monotonic clock."""
        self._numbers[_BEAT] = now

    def _append(self, name: str, labels: Labels, count: int) -> memoryview[float] | None:
        text = json.dumps([name, *labels], ensure_ascii=False).encode("utf-8", "surrogatepass")
        padded = len(text) + -len(text) % 8
        start = self._end + _RECORD.size + padded
        end = start + 8 * count
        if end > REGION_BYTES or len(text) > _MOST_TEXT:
            if not self._full:
                self._full = True
                log.error(
                    "the memory of the metrics is full: %d series fit; further series show what the process"
                    " that answers has counted only. Serve fewer versions.",
                    sum(map(len, self._series.values())),
                )
            return None
        # What a predecessor was writing when it died must not become a first value.
        self._bytes[start:end] = bytes(end - start)
        self._bytes[self._end + _RECORD.size : self._end + _RECORD.size + len(text)] = text
        _RECORD.pack_into(self._bytes, self._end, _checksum(text, count), len(text), count)
        # Readers see the record only now that it is complete.
        self._end = self._words[_END] = end
        numbers = self._series[name][labels] = self._numbers[start // 8 : start // 8 + count]
        return numbers


class RegionReader:
    """Reads the region of another process. Any thread may call its methods, `refresh` one at a time."""

    def __init__(self, file: int, slot: int) -> None:
        """Read the region of `slot` in `file`; it is mapped once a process has written to it."""
        self._file = file
        self._slot = slot
        self._bytes: memoryview[int] | None = None
        self._parsed = _HEADER_BYTES
        self._series: dict[str, dict[Labels, memoryview[float]]] = {}

    def refresh(self) -> None:
        """Look for series that were added."""
        if self._bytes is None:
            if os.pread(self._file, len(MAGIC), self._slot * REGION_BYTES) != MAGIC:
                return
            mapped = mmap.mmap(
                self._file, REGION_BYTES, prot=mmap.PROT_READ, offset=self._slot * REGION_BYTES
            )
            self._bytes = memoryview(mapped)
            self._words = self._bytes.cast("Q")
            self._numbers = self._bytes.cast("d")
        end = self._words[_END]
        if end < self._parsed:
            # A predecessor's records were damaged, and the successor has written over them.
            self._parsed, self._series = _HEADER_BYTES, {}
        found: dict[str, dict[Labels, memoryview[float]]] = {}
        for name, labels, start, count in records(self._bytes, self._parsed, end):
            found.setdefault(name, {})[labels] = self._numbers[start : start + count]
            self._parsed = 8 * (start + count)
        # New mappings in place of the old ones, because another thread may go through those.
        self._series.update({name: {**self.series(name), **series} for name, series in found.items()})

    def series(self, name: str) -> Mapping[Labels, memoryview[float]]:
        """The series of the metric `name` at the last `refresh`, by label values."""
        return self._series.get(name, {})

    @property
    def pid(self) -> int:
        """The id of the process that has the slot, or had it last; 0 before the first."""
        return 0 if self._bytes is None else self._words[_PID]

    @property
    def beat(self) -> float:
        """The moment of the process's last beat; 0.0 before the first."""
        return 0.0 if self._bytes is None else self._numbers[_BEAT]


class Regions:
    """The region of this process beside the readers of all others."""

    def __init__(self, file: int, slot: int) -> None:
        """Write into `slot` of `file`, which `make_regions` made."""
        self.own = Region(file, slot)
        slots = os.fstat(file).st_size // REGION_BYTES
        self.others = [RegionReader(file, each) for each in range(slots) if each != slot]
        self.lock = threading.Lock()
        """Held while the readers are refreshed."""


def records(data: memoryview[int], start: int, end: int) -> Iterator[tuple[str, Labels, int, int]]:
    """Name, label values, index of the first number and count of numbers of the records in `data`.

    `start` and `end` are offsets in bytes. The first record that is not valid ends the reading.
    """
    end = min(end, len(data))
    while start + _RECORD.size <= end:
        checksum, length, count = _RECORD.unpack_from(data, start)
        first = start + _RECORD.size
        numbers = first + length + -length % 8
        if not length or numbers + 8 * count > end:
            return
        text = bytes(data[first : first + length])
        if _checksum(text, count) != checksum:
            return
        try:
            name, *labels = json.loads(text.decode("utf-8", "surrogatepass"))
        except (ValueError, TypeError, RecursionError):
            return
        if not isinstance(name, str) or not all(isinstance(label, str) for label in labels):
            return
        yield name, tuple(labels), numbers // 8, count
        start = numbers + 8 * count


def _checksum(text: bytes, count: int) -> int:
    return zlib.crc32(text, count)
