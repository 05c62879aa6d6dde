"""Decides which files of a store are models, and where they belong in a local folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from inferpool.errors import StoreError
from inferpool.system.files import printable

_JUNK = ("__MACOSX", ".DS_Store", ".git", ".gitattributes", ".cache", ".labels.json")
"""Names of what other programs leave behind, and of this server's own notes."""
BESIDE = ("model.toml", "labels.txt", "tokenizer.json")
"""Files that belong beside the versions of a model."""
MOST_FILES = 100_000


class Arrangement(NamedTuple):
    """Where files belong.

    Attributes:
        depth: 1 if the folder has folders of models, 0 if it is the folder of one model.
        files: for each path in the local folder, the path in the store.
    """

    depth: int
    files: dict[str, str]


def arrange(paths: Iterable[str], name: str, suffixes: Collection[str]) -> Arrangement:
    """Find the layout of a repository, of a model's folder or of a single model in `paths`.

    `name` is that of a single model file, and `suffixes` are those of model files. A folder around everything
    is taken off. Raises StoreError for names that could leave the folder, and if there is no model.
    """
    files = [path for path in sorted(set(paths)) if not _is_junk(path)]
    if len(files) > MOST_FILES:
        raise StoreError(f"more than {MOST_FILES} files; name a folder with fewer")
    for path in files:
        check_path(path)
    folders = {path[:end] for path in files for end in _slashes(path)}
    for path in files:
        if path in folders:
            raise StoreError(f"{printable(path)} is both a file and a folder")
    endings = "|".join(re.escape(suffix) for suffix in suffixes)
    version = re.compile(rf"[1-9]\d*/[^/]+({endings})")
    repository = re.compile(rf"[^/]+/(?:[1-9]\d*/[^/]+({endings})|model\.toml)")
    prefix = ""
    while True:
        inside = [path[len(prefix) :] for path in files]
        if any(map(version.fullmatch, inside)):
            return Arrangement(0, {path: prefix + path for path in inside})
        if any(map(repository.fullmatch, inside)):
            return Arrangement(1, {path: prefix + path for path in inside})
        roots = [path for path in inside if "/" not in path and path.endswith(tuple(suffixes))]
        single = _single(inside, roots, tuple(suffixes))
        if single is not None:
            return Arrangement(0, {target: prefix + path for target, path in single.items()})
        if roots:
            taken = {path: prefix + path for path in inside}
            return Arrangement(1, taken)
        tops = {path.partition("/")[0] for path in inside}
        if len(tops) != 1 or not inside or "/" not in inside[0]:
            break
        prefix += f"{tops.pop()}/"
    shown = ", ".join(map(printable, files[:5])) + (", …" if len(files) > 5 else "")
    expected = f"{name}/1/model.onnx, 1/model.onnx or {name}.onnx"
    raise StoreError(f"no models: expected {expected}, and there is {shown or 'nothing'}")


def _single(paths: list[str], roots: list[str], suffixes: tuple[str, ...]) -> dict[str, str] | None:
    """The paths of the one model without a version (`model.onnx`, `onnx/model.onnx`); None without one."""
    models = [path for path in paths if path.endswith(suffixes)]
    named = [path for path in roots if path.rpartition(".")[0] == "model"]
    named = named or [path for path in models if path.rpartition(".")[0] == "onnx/model"]
    if len(named) != 1 or len(roots) > 1:
        return None
    [chosen] = named
    folder = chosen.rpartition("/")[0]
    others = tuple(path for path in models if path != chosen)
    targets = {f"1/model.{chosen.rpartition('.')[2]}": chosen}
    for path in paths:
        if path in BESIDE or path.startswith("samples/"):
            targets[path] = path
        elif path != chosen and path.rpartition("/")[0] == folder and not path.startswith(others):
            targets[f"1/{path.rpartition('/')[2]}"] = path  # may be weights, which the model names
    return targets


def check_path(path: str) -> None:
    """Raise StoreError if a name of a store could mean something else than a file below the folder."""
    parts = path.split("/")
    if (
        path.startswith("/")
        or any(part in ("", ".", "..") for part in parts)
        or not path.isprintable()
        or "\\" in path
        or len(path.encode()) > 1024
        or any(len(part.encode()) > 255 for part in parts)
    ):
        raise StoreError(f"a file has the name {printable(path[:200])!r}, which cannot be taken; rename it")


def _is_junk(path: str) -> bool:
    parts = path.split("/")
    return any(part in _JUNK or part.startswith("._") for part in parts)


def _slashes(path: str) -> list[int]:
    return [index for index, character in enumerate(path) if character == "/"]
