"""Readable reasons why an ONNX file cannot be loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from inferpool.backends.onnx.model_file import graph_values
from inferpool.errors import LoadError, Reason

UNNAMED_ELEMENTS: Final = {
    14: "complex64",
    15: "complex128",
    17: "float8e4m3fn",
    18: "float8e4m3fnuz",
    19: "float8e5m2",
    20: "float8e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
    24: "float8e8m0",
    25: "uint2",
    26: "int2",
    27: "float6e2m3",
    28: "float6e3m2",
}
"""The element types of onnx.proto (`TensorProto.DataType`) that the protocol has no datatype for."""

_NOISE: Final = (
    re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : "),
    # The place in the runtime's source: a path, a line, and the signature of a function.
    re.compile(
        r"/\S+\.(?:cc|cpp|cu|cuh|h):\d+ "
        r"[^()]*(?:\((?:[^()]|\([^()]*\))*\)[^\s()]*)+(?: const)?(?: \[with [^\]]*\])? "
    ),
    # The short form of the place: a file name, a line, and the name of a function.
    re.compile(r"\b\w+\.(?:cc|cpp|cu|cuh|h):\d+ \w+ "),
    # The resolved path on this machine. The text before already has the path itself.
    re.compile(r" resolved path: .*"),
)
_NO_LOCALE: Final = re.compile(r"Failed to construct locale with name:\s*([\w.@-]+)")
_KEPT_CHARACTERS: Final = 500
_LFS_POINTER: Final = b"version https://git-lfs"


def check_file(file: Path) -> None:
    """Raise LoadError if `file` is missing, unreadable, empty, a folder or a Git LFS pointer."""
    try:
        if not file.is_file():
            raise LoadError(f"{file.name} {'is a folder, not a file' if file.is_dir() else 'does not exist'}")
        with file.open("rb") as opened:
            start = opened.read(len(_LFS_POINTER))
    except OSError as error:
        raise LoadError(f"{file.name} cannot be read: {error.strerror}") from error
    if not start:
        raise LoadError(f"{file.name} is empty")
    if start == _LFS_POINTER:
        raise LoadError(f"{file.name} is a Git LFS pointer, not the model: run git lfs pull")


def readable_error(file: Path, error: str) -> Reason:
    """The runtime's `error` about `file`, an absolute path, without its source and this machine's folders."""
    if "Protobuf parsing failed" in error:
        return f"{file.name} is not an ONNX model, or is incomplete; export it again, or copy the whole file"
    if (lacking := _NO_LOCALE.search(error)) is not None:
        return _without_locale(file, lacking[1])
    text = without_noise(error.replace(f"Load model from {file} failed:", ""))
    for folder in {str(file.parent), str(file.parent.resolve())} - {file.anchor}:
        text = text.replace(f"{folder}{os.sep}", "").replace(folder, "the model's folder")
    text = " ".join(text.split())
    if len(text) > _KEPT_CHARACTERS:
        text = text[:_KEPT_CHARACTERS] + "…"
    return f"ONNX Runtime cannot load {file.name}: {'; '.join([text, *_unservable(file)])}"


def _without_locale(file: Path, name: str) -> Reason:
    """Tell which locale to install for an operation that changes the case of letters, as in TF-IDF."""
    language, _, charset = name.partition(".")
    made = f"localedef -i {language} -f {charset or 'UTF-8'}"
    return (
        f"{file.name} needs the locale {name} (StringNormalizer), which this machine does not have; install"
        f" it (Debian, Ubuntu: apt-get install locales && {made} {name}; Fedora: dnf install"
        f" glibc-langpack-{language.partition('_')[0]}), or make it in a folder ({made} FOLDER/{name})"
        " and set LOCPATH=FOLDER for the server"
    )


def without_noise(error: str) -> str:
    """A message of the runtime without its code for the error and the places in its source."""
    for noise in _NOISE:
        error = noise.sub("", error)
    return error.strip()


def _unservable(file: Path) -> list[str]:
    """The inputs and outputs of types that no request can carry. The runtime does not name them."""
    try:
        values = graph_values(file)
    except (OSError, ValueError, IndexError):
        return []
    return [
        f'{"input" if value.is_input else "output"} "{value.name}" has type'
        f" tensor({UNNAMED_ELEMENTS[value.element]}), which cannot be served"
        for value in values
        if value.element in UNNAMED_ELEMENTS
    ]
