"""Imports that the garbage collector leaves alone, and pydantic without plugins."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


def without_plugins() -> None:
    """Let pydantic look for no plugins, unless a user names some to leave out.

    It would read files of every installed package. The server's models need none.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


@contextlib.contextmanager
def kept_imports() -> Iterator[None]:
    """Let no garbage collection, now or later, look at what is imported within the block: it stays for good.

    For the main thread of a process, before there are others: what these have at the moment would stay, too.
    """
    with no_collections():
        yield
    gc.freeze()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Let the garbage collector rest within the block: what modules make stays for good.

    Python would traverse all of them again and again while their number grows, for a sixth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
