"""Finds a backend by its name or by the suffix of a file.

The built-in backends are imported when they are first needed. A server without torch, or without ONNX
Runtime, therefore still starts. Other packages may add backends under the entry-point group
`inferpool.backends`.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from inferpool.errors import LoadError

if TYPE_CHECKING:
    from inferpool.backends.base import Backend  # which imports numpy; the suffixes need it not

_BUILT_IN: Final = {
    "onnx": ("inferpool.backends.onnx.backend", "OnnxBackend", (".onnx",)),
    "torch": ("inferpool.backends.torch.backend", "PyTorchBackend", (".pt", ".pt2")),
}
"""Name to module, class and suffixes."""

ENTRY_POINT_GROUP: Final = "inferpool.backends"
_GROUP_NAME: Final = ENTRY_POINT_GROUP.encode()


def _added() -> EntryPoints:
    """The backends of other packages."""
    return _added_in(tuple(sys.path))


@lru_cache(maxsize=1)
def _added_in(path: tuple[str, ...]) -> EntryPoints:
    """The backends of the packages in `path`, which is `sys.path`."""
    # Python would parse a file of every installed package, at every start. Hardly any server has a backend
    # of another package.
    if not any(_may_add(folder) for folder in path):
        return EntryPoints()
    return entry_points(group=ENTRY_POINT_GROUP)


def _may_add(folder: str) -> bool:
    """Whether a package in `folder`, an item of `sys.path`, may have a backend; Python tells for certain."""
    try:
        with os.scandir(folder or ".") as found:
            entries = list(found)
    except NotADirectoryError:
        return True  # an archive
    except OSError:
        return False
    for entry in entries:
        if entry.name.endswith((".dist-info", ".egg-info")):
            with suppress(OSError):
                if _GROUP_NAME in Path(entry.path, "entry_points.txt").read_bytes():
                    return True
        elif entry.name.endswith(".egg"):
            return True
    return False


def backend_names() -> tuple[str, ...]:
    """The names of all backends, whether or not their runtimes are installed."""
    added = (point.name for point in _added())
    return (*_BUILT_IN, *added)


def find_backend(name: str) -> Backend:
    """The backend called `name`; raises LoadError if there is none or its runtime is not installed."""
    if name in _BUILT_IN:
        module, attribute, _ = _BUILT_IN[name]
        backend: Backend = getattr(importlib.import_module(module), attribute)()
        return backend
    for point in _added():
        if point.name == name:
            found: Backend = point.load()()
            return found
    raise LoadError(f'no backend is called "{name}"; expected one of {", ".join(backend_names())}')


def describe_backends() -> dict[str, str]:
    """The runtime and version of every backend by name; `not installed` if its runtime is missing."""
    described = {}
    for name in backend_names():
        try:
            described[name] = find_backend(name).describe()
        except LoadError:
            described[name] = "not installed"
    return described


def backends_by_suffix() -> dict[str, str]:
    """File suffix to backend name, for all backends. A built-in backend wins over an added one."""
    suffixes = {suffix: name for name, (_, _, listed) in _BUILT_IN.items() for suffix in listed}
    for point in _added():
        for suffix in point.load().suffixes:
            suffixes.setdefault(suffix, point.name)
    return suffixes
