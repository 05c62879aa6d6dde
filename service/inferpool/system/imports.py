"""Imports without garbage collections, which take a sixth of the time, and without plugins of pydantic."""

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
def no_collections() -> Iterator[None]:
    """Let the garbage collector rest within the block: what modules make stays for good.

    Python would traverse all of them again and again while their number grows.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
