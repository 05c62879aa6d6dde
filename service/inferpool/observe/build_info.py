"""The versions of this installation, for the metric `build_info` and the log."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from inferpool import __version__, tensors


def build_info(backends: Mapping[str, str]) -> dict[str, str]:
    """The labels of `build_info`: the versions of Inferpool, Python and the `backends`, and `hot_path`."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "hot_path": hot_path(),
        **backends,
    }


def hot_path() -> str:
    """`compiled` if the modules that every request passes through are compiled, else `interpreted`."""
    return "interpreted" if tensors.__file__.endswith(".py") else "compiled"
