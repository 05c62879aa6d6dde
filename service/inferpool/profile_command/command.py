"""The command `inferpool profile`: a model and rows like those that it was trained with in, a profile out.

The rows go through the whole server, so that the profile has the fields as requests will have them.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from inferpool.command_output import print_lines
from inferpool.errors import ConfigError
from inferpool.predict_command.command import local_settings
from inferpool.settings_sources import CHECK_SETTINGS, add_flags

if TYPE_CHECKING:
    from inferpool.client import Client
    from inferpool.drift.build import ProfileBuilder

_SENTENCES: Final = ".txt"


def add_profile_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `inferpool`."""
    command = commands.add_parser(
        "profile",
        help="write what a model's inputs and outputs usually are",
        description="Ask MODEL about every row of --data, and write how its inputs and outputs are"
        " distributed into the folder of the version, as profile.json. A server that finds it there tells"
        " how far its requests are from that. DATA is CSV, Parquet, JSON lines, npz, a text file with a"
        " sentence a line, or a folder of pictures.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="path of a model")
    command.add_argument(
        "--data", required=True, type=Path, metavar="DATA", help="rows like those that the model was made for"
    )
    command.add_argument(
        "--ignore",
        dest="ignored",
        metavar="COLUMN",
        action="append",
        default=[],
        help="a column or array that the model is not given, such as the right answers; may be repeated",
    )
    command.add_argument(
        "--version", dest="model_version", metavar="VERSION", type=int, help="a version [the newest]"
    )
    add_flags(command, CHECK_SETTINGS)


def run_profile_command(flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    chosen = {name: flags.pop(name) for name in ("model", "data", "ignored", "model_version")}
    return print_lines(lambda: _profile(chosen, flags, environ))


def _profile(chosen: dict[str, Any], flags: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Make the profile, write it, and return the lines that say what it has."""
    from inferpool.backends.registry import backends_by_suffix
    from inferpool.drift.build import LEAST_ADVISED, ProfileBuilder
    from inferpool.drift.profile_file import PROFILE_FILE, profile_bytes
    from inferpool.predict_command.local_server import run_with_model
    from inferpool.repository.layout import scan

    path: Path = chosen["model"]
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    folders = scan(path, backends_by_suffix())
    files = folders[0].files if len(folders) == 1 else {}
    version = chosen["model_version"] or max(files, default=0)
    if version not in files or folders[0].folder is None:
        raise ConfigError(f"{path} is not the folder of one model with the version {version or 1}")
    inputs = _read(chosen["data"], chosen["ignored"])
    builder = ProfileBuilder()
    taken = _Taken(builder, version)

    def use(client: Client, model: str) -> None:
        client.predict_many(model, inputs, version=version, progress=sys.stderr.isatty())

    try:
        run_with_model(path, local_settings(flags, environ), use, taken.take)
        profile, left_out = builder.profile(chosen["data"].name)
    finally:
        builder.close()
    file = files[version].parent / PROFILE_FILE
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as opened:
            opened.write(profile_bytes(profile))
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    lines = [f"{folders[0].name} {version}: {profile.rows} rows"]
    for field in profile.fields:
        if field.kind == "number":
            middle = field.edges[len(field.edges) // 2] if field.edges else float("nan")
            lines.append(f"{field.name:<32} number, half of them up to {middle:.4g}")
        else:
            shown = ", ".join(field.values[:5]) + (", …" if len(field.values) > 5 else "")
            lines.append(f"{field.name:<32} {len(field.values)} values: {shown}")
    if profile.rows < LEAST_ADVISED:
        lines.append(
            f"{profile.rows} rows are few: take at least {LEAST_ADVISED}, or chance will look like drift"
        )
    if left_out:
        lines.append(f"{len(left_out)} fields are left out: {', '.join(left_out[:5])}")
    return [*lines, f"written: {file}"]


class _Taken:
    """Takes the requests that the server observes."""

    def __init__(self, builder: ProfileBuilder, version: int) -> None:
        self._builder = builder
        self._version = version
        self._lock = threading.Lock()

    def take(self, observation: Any) -> None:
        """Add the rows of a request to the profile."""
        observer = observation.observer
        if observer.key.version != self._version:
            return
        values = observation.values()
        with self._lock:
            self._builder.add(values, max(map(len, values.values()), default=0))


def _read(path: Path, ignored: list[str]) -> Any:
    """What a client predicts with; raises InvalidInput, or OSError."""
    import numpy as np

    from inferpool.errors import InvalidInput
    from inferpool.evaluate_command.labelled_rows import read_table
    from inferpool.predict_command.rows_in import PICTURE_SUFFIXES

    if path.is_dir():
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        if not pictures:
            raise InvalidInput(f"{path} has no pictures")
        return pictures
    if path.suffix.lower() == _SENTENCES:
        sentences = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not sentences:
            raise InvalidInput(f"{path.name} has no lines")
        return sentences
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files if name not in ignored}
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays
    table = read_table(path)
    unknown = next((name for name in ignored if name not in table.column_names), None)
    if unknown is not None:
        raise InvalidInput(f'{path.name} has no column "{unknown}"; it has {", ".join(table.column_names)}')
    table = table.drop_columns(ignored)
    is_text = len(table.column_names) == 1 and str(table.schema.types[0]) in ("string", "large_string")
    return table.column(0).to_pylist() if is_text else table
