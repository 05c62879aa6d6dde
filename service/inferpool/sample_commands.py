"""The commands of samples: `inferpool samples list`, `export`, `delete` and `new-key`."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from inferpool.admin_commands import (
    DEFAULT_URL,
    KEY_VARIABLE,
    URL_VARIABLE,
    WHERE,
    AdminError,
    RunningServer,
)
from inferpool.errors import InferpoolError
from inferpool.settings_sources import ENV_PREFIX
from inferpool.system.files import printable
from inferpool.system.install_hints import install_command

_CHOICE: Final = ("id", "tenant", "model", "version", "older_than_s")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
TARGET: Final = "target"
_AT_ONCE: Final = 1000


def add_sample_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `samples` and its own commands."""
    samples = commands.add_parser(
        "samples",
        help="list, export and delete samples of requests, and make their keys",
        description="List, export and delete the samples that a running server keeps of requests, or make a"
        " key that encrypts them.",
        allow_abbrev=False,
    )
    actions = samples.add_subparsers(
        dest="action", required=True, metavar="ACTION", help="list, export, delete or new-key"
    )
    listing = _add(actions, "list", "List the samples: when, model, version, rows, bytes and request.")
    export = _add(
        actions, "export",
        "Write the samples of a model to FILE: CSV, Parquet or npz. With --target, the columns are those that"
        " `inferpool evaluate --data` reads.",
    )  # fmt: skip
    export.add_argument("file", metavar="FILE", type=Path, help="a new file: .csv, .parquet or .npz")
    export.add_argument(
        "--target",
        metavar="FIELD",
        help=f"an output that becomes the column {TARGET}, beside the inputs alone: logits.label for example",
    )
    delete = _add(actions, "delete", "Delete the samples for which everything that is given holds.")
    for command in (listing, export, delete):
        required = command is export
        command.add_argument("--model", required=required, metavar="MODEL", help="the name of a model")
        command.add_argument("--version", type=int, metavar="VERSION", help="the number of a version")
        command.add_argument("--id", metavar="ID", help="the id of a request")
        command.add_argument("--tenant", metavar="TENANT", help="to whom the keys of the requests belong")
        command.add_argument(
            "--older-than", dest="older_than_s", type=_seconds, metavar="SPAN", help="an age: 30d, 12h or 30m"
        )
        command.add_argument("--url", help=f"the address of the server, or unix:PATH [{URL_VARIABLE}]")
    new = actions.add_parser(
        "new-key",
        help="make a key, and put it on top of the file",
        description="Make a key, and put it on top of the file of keys, which is made if it is missing."
        " Servers that start from then on encrypt by it, and read samples of all keys in the file.",
        allow_abbrev=False,
    )
    new.add_argument("name", metavar="NAME", nargs="?", help="the id of the key [the date]")
    new.add_argument(
        "--keys-file",
        type=Path,
        default=os.environ.get(f"{ENV_PREFIX}SAMPLES_KEYS_FILE"),
        metavar="FILE",
        help=f"file of keys [{ENV_PREFIX}SAMPLES_KEYS_FILE]",
    )


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, description: str
) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=f"{name} samples of a running server",
        description=description,
        epilog=WHERE,
        allow_abbrev=False,
    )


def _seconds(text: str) -> float:
    """A span as people write it, `30d`; raises ArgumentTypeError."""
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is no span; write 30d, 12h, 30m or 0s") from None
    if not 0 <= seconds <= 1e10:
        raise argparse.ArgumentTypeError(f"{text} is no span that anything can be older than")
    return seconds


def run_sample_command(flags: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Run a command; the exit status is 0, or 1 if the server cannot be reached, refuses, or nothing fits."""
    try:
        if flags["action"] == "new-key":
            _new_key(flags["keys_file"], flags["name"])
            return 0
        server = RunningServer(
            flags["url"] or environ.get(URL_VARIABLE) or DEFAULT_URL, environ.get(KEY_VARIABLE)
        )
        choice = {name: flags[name] for name in _CHOICE if flags[name] is not None}
        if flags["action"] == "delete":
            if not choice:
                raise AdminError("name what to delete: --id, --tenant, --model, --version or --older-than")
            print(f"{server.ask('DELETE', f'/samples?{urlencode(choice)}')['deleted']} samples deleted")
        elif flags["action"] == "list":
            _list(server, choice)
        else:
            rows, samples = _export(server, choice, flags["file"], flags["target"])
            print(f"{rows} rows of {samples} samples: {printable(str(flags['file']))}")
    except (AdminError, InferpoolError, OSError, ValueError, ImportError) as error:
        print(f"inferpool: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _new_key(file: Path | str | None, name: str | None) -> None:
    from inferpool.privacy.keys import add_key

    if file is None:
        raise ValueError(f"no file of keys is named; use --keys-file or {ENV_PREFIX}SAMPLES_KEYS_FILE")
    name = name or time.strftime("%Y-%m-%d", time.gmtime())
    add_key(Path(file), name)
    print(f"key {name} is on top of {printable(str(file))}")


def _pages(server: RunningServer, choice: Mapping[str, Any], *, rows: bool) -> Iterator[dict[str, Any]]:
    """The answers of the server, as many as it takes to have all samples."""
    after = 0
    while True:
        query = {**choice, "after": after, "limit": _AT_ONCE, "rows": str(rows).lower()}
        page = server.ask("GET", f"/samples?{urlencode(query)}")
        yield page
        if page["next"] is None:
            return
        after = page["next"]


def _list(server: RunningServer, choice: Mapping[str, Any]) -> None:
    for number, page in enumerate(_pages(server, choice, rows=False)):
        if not number:
            print(f"{page['held']} samples of {page['bytes']} bytes are held")
        for each in page["samples"]:
            when = datetime.fromtimestamp(each["created"], UTC)
            name = each["id"] if each["id"] is not None else f"unreadable: the key {each['key']} is gone"
            print(
                printable(
                    f"{when:%Y-%m-%d %H:%M:%S}  {each['model']}/{each['version']}  {each['rows']} rows"
                    f"  {each['bytes']} bytes  {name}"
                )
            )


def _export(
    server: RunningServer, choice: Mapping[str, Any], file: Path, target: str | None
) -> tuple[int, int]:
    """Write the samples to a new file; returns how many rows and samples that were."""
    write = {".csv": _write_csv, ".parquet": _write_parquet, ".npz": _write_npz}.get(file.suffix.lower())
    if write is None:
        raise ValueError(f"{file}: expected a name that ends with .csv, .parquet or .npz")
    columns: dict[str, list[Any]] = {}
    total = samples = 0
    for page in _pages(server, choice, rows=True):
        for sample in page["samples"]:
            if sample["inputs"] is None:
                continue  # its key is gone
            found = _columns(sample, target, as_arrays=write is _write_npz)
            if found is None:
                continue
            samples += 1
            for name in dict.fromkeys([*columns, *found]):
                values = columns.setdefault(name, [None] * total)
                values += found.get(name, [None] * sample["rows"])
            total += sample["rows"]
    if not total:
        raise ValueError("no samples fit" if target is None else f"no samples have the output {target}")
    # What is in the file is no longer encrypted, so only its owner may read it.
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        write(file, columns)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return total, samples


def _columns(
    sample: Mapping[str, Any], target: str | None, *, as_arrays: bool
) -> dict[str, list[Any]] | None:
    """The columns of a sample; None if it lacks the target."""
    spread = _whole if as_arrays else _spread
    found: dict[str, list[Any]] = {}
    for field in sample["inputs"]:
        found.update(spread(field["name"], field["values"]))
    if target is not None:
        values = next((field["values"] for field in sample["outputs"] if field["name"] == target), None)
        if values is None:
            return None
        found[TARGET] = [
            value[0] if isinstance(value, list) and len(value) == 1 else value for value in values
        ]
        if any(isinstance(value, list) for value in found[TARGET]):
            raise ValueError(
                f"{target} has several numbers a row; name a field with one, such as {target}.label"
            )
        return found
    rows = sample["rows"]
    found["request_id"] = [sample["id"]] * rows
    found["version"] = [sample["version"]] * rows
    found["created"] = [sample["created"]] * rows
    for field in sample["outputs"]:
        found.update(spread(f"output.{field['name']}", field["values"]))
    return found


def _whole(name: str, values: list[Any]) -> dict[str, list[Any]]:
    return {name: values}


def _spread(name: str, values: list[Any]) -> dict[str, list[Any]]:
    """A field as columns: one for each number of a row."""
    if not any(isinstance(value, list) for value in values):
        return {name: values}
    width = len(values[0])
    if any(len(value) != width or any(isinstance(each, list) for each in value) for value in values):
        raise ValueError(f"{name} has rows that are no lists of numbers; write a file .npz")
    if width == 1:
        return {name: [value[0] for value in values]}
    return {f"{name}[{at}]": [value[at] for value in values] for at in range(width)}


def _write_csv(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_parquet(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"Parquet needs pyarrow: {install_command('tables')}") from None
    parquet.write_table(pa.table(dict(columns)), file)


def _write_npz(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    import numpy as np

    with file.open("wb") as opened:
        arrays: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
        np.savez(opened, **arrays)
