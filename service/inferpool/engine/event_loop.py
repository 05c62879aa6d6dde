"""The part of an event loop that the client of an engine uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Loop(Protocol):
    """The methods of an event loop that the client of an engine calls; asyncio's and uvloop's have them."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> object:
        """Call `callback` in the next iteration."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object:
        """Call `callback` in the next iteration, and wake the loop; for any thread."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> object:
        """Call `callback` after `delay` seconds."""

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> object:
        """Call `callback` whenever `fd` can be read."""

    def remove_reader(self, fd: Any) -> object:
        """Stop what `add_reader` began."""

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> object:
        """Call `callback` whenever `fd` can be written."""

    def remove_writer(self, fd: Any) -> object:
        """Stop what `add_writer` began."""
