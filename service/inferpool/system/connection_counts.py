"""How many connections each process of a server has, in memory that all of them share."""

from __future__ import annotations

import hashlib
import mmap
import os
from typing import Final

_SECRET_BYTES: Final = 16
_ADDRESSES: Final = 16_384
"""Counters of addresses. Two addresses that share one by chance also share their limit."""
_ABSENT: Final = b"\xff\xff\xff\xff"
"""The count of a process that accepts nothing: no other process leaves connections to it."""


def make_counts(processes: int) -> int:
    """The descriptor of the memory for `processes`. Pages that nobody writes to take no memory."""
    file = os.memfd_create("inferpool-connections", os.MFD_CLOEXEC)
    os.ftruncate(file, _size(processes))
    os.pwrite(file, os.urandom(_SECRET_BYTES), 0)
    return file


def set_absent(file: int, number: int, processes: int) -> None:
    """Note that the process `number`, from 0, does not run: it accepts nothing, and has no connections."""
    os.pwrite(file, _ABSENT, _SECRET_BYTES + 4 * number)
    os.pwrite(file, bytes(2 * _ADDRESSES), _SECRET_BYTES + 4 * processes + 2 * _ADDRESSES * number)


class ConnectionCounts:
    """The counts, as one of the processes sees them."""

    def __init__(self, file: int, number: int, processes: int) -> None:
        """`number` from 0 is that of this process; `file` is what `make_counts` returned."""
        self._map = mmap.mmap(file, _size(processes))
        memory = memoryview(self._map)
        self._secret = bytes(memory[:_SECRET_BYTES])
        self._counts = memory[_SECRET_BYTES : _SECRET_BYTES + 4 * processes].cast("I")
        self._addresses = memory[_SECRET_BYTES + 4 * processes :].cast("H")
        self._number = number
        self._first = _ADDRESSES * number

    def set(self, count: int) -> None:
        """Tell the others how many connections this process has."""
        self._counts[self._number] = count

    def lead(self) -> int:
        """How many connections this process has more than another one, apart from a few per cent."""
        count = self._counts[self._number]
        return max(0, count - min(self._counts) - (count >> 4))

    def enter(self, address: str, limit: int) -> int:
        """Count a connection of a client at `address`; -1 if all processes have `limit` of them already.

        Otherwise the result is what `leave` takes.
        """
        digest = hashlib.blake2s(address.encode(), key=self._secret, digest_size=4).digest()
        counter = int.from_bytes(digest, "little") % _ADDRESSES
        if sum(self._addresses[counter::_ADDRESSES]) >= limit:
            return -1
        self._addresses[self._first + counter] += 1
        return counter

    def leave(self, counter: int) -> None:
        """Take note that a connection that `enter` has counted is gone."""
        self._addresses[self._first + counter] -= 1


def _size(processes: int) -> int:
    return _SECRET_BYTES + processes * (4 + 2 * _ADDRESSES)
