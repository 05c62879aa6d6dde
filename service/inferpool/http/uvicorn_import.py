"""Imports uvicorn without its command line. A module that needs uvicorn imports this module first.

The package imports its command, which imports click, watchfiles and multiprocessing: a tenth of the time in
which a server starts, and memory for as long as it runs.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

_COMMAND: Final = "uvicorn.main"


class _Command(ModuleType):
    """Stands for the module of the command while the package takes three names from it."""

    def __getattr__(self, name: str) -> Any:
        if name == "Server":
            return importlib.import_module("uvicorn.server").Server
        if name not in ("main", "run"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(_COMMAND), name)(*arguments, **options)

        return call


if "uvicorn" not in sys.modules:
    sys.modules[_COMMAND] = _Command(_COMMAND)
    try:
        import uvicorn  # noqa: F401
    finally:
        del sys.modules[_COMMAND]
