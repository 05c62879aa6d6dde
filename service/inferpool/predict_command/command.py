"""The command `inferpool predict`: the rows of a file in, the outputs of a model out."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from inferpool.command_output import print_failure
from inferpool.errors import ConfigError, InferpoolError
from inferpool.settings import Settings
from inferpool.settings_sources import CHECK_SETTINGS, ENV_PREFIX, add_flags, read_settings
from inferpool.system.install_hints import install_command

if TYPE_CHECKING:
    # It needs the extra `client`, which other commands do not.
    from inferpool.client import Client

KEY_VARIABLE: Final = f"{ENV_PREFIX}KEY"
_TIMEOUT_S: Final = 600.0
_RETRIES: Final = 20
_OWN_SETTINGS: Final = (*CHECK_SETTINGS, "log_level", "memory_bytes", "run_timeout_s")
"""The settings that are read from variables: those of a server that others reach do not matter here."""


def add_predict_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `inferpool`."""
    command = commands.add_parser(
        "predict",
        help="predict with the rows of a file, here or by a server",
        description="Run MODEL on every row of FILE and write the outputs to --output. MODEL is the path of a"
        " model, which is loaded here; with --url it is the name of a model on a server. FILE is CSV,"
        " Parquet, JSON lines, npy, npz, a text of one sentence a line, a picture, or a folder of pictures. A"
        " run that was interrupted goes on if it is started again.",
        epilog=f"The key of the server is read from {KEY_VARIABLE} or --key-file, never from the command"
        " line, which other users of the machine can see.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", help="path of a model, or its name on the server")
    command.add_argument("file", metavar="FILE", type=Path, help="the rows")
    command.add_argument(
        "--output",
        "-o",
        required=True,
        type=Path,
        metavar="FILE",
        help="where to write; .csv, .parquet, .jsonl, .ndjson or .npz",
    )
    command.add_argument("--url", help="address of a server, or unix:PATH")
    command.add_argument(
        "--key-file", type=Path, metavar="FILE", help="file that holds only the key of the server"
    )
    command.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates to trust, for https")
    command.add_argument("--version", dest="model_version", metavar="VERSION", help="a version, or its label")
    command.add_argument(
        "--outputs", metavar="NAME", action="append", help="an output to write; may be repeated [all]"
    )
    command.add_argument(
        "--labels", action="store_true", help="write the best label of each row and its score"
    )
    command.add_argument(
        "--keep-errors",
        action="store_true",
        help="write rows that cannot be answered with their errors; without it, the first one ends the run",
    )
    command.add_argument(
        "--rows-per-request",
        type=_positive,
        metavar="N",
        help="rows sent together [1024 of a table, a megabyte of arrays, 64 sentences, 8 pictures]",
    )
    command.add_argument(
        "--concurrency", type=_positive, default=4, metavar="N", help="requests at the same time [4]"
    )
    add_flags(command, CHECK_SETTINGS)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1")
    return int(text)


def run_predict_command(flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    chosen = {
        name: flags.pop(name)
        for name in ("model", "file", "output", "url", "key_file", "ca_file", "model_version", "outputs",
                     "labels", "keep_errors", "rows_per_request", "concurrency")
    }  # fmt: skip
    try:
        print(_predict(chosen, flags, environ), file=sys.stderr)
        return 0
    except (InferpoolError, OSError, ValueError, ImportError) as error:
        return print_failure(error)


def _predict(chosen: dict[str, Any], flags: dict[str, Any], environ: Mapping[str, str]) -> str:
    """Predict; returns the line that says what was done."""
    try:
        from inferpool.client import Client
    except ImportError as missing:
        raise ImportError(f"{missing.name} is missing: {install_command('client')}") from missing
    from inferpool.predict_command.finished_chunks import FinishedChunks
    from inferpool.predict_command.rows_in import open_source
    from inferpool.predict_command.rows_out import check_output
    from inferpool.predict_command.run import RunOptions, describe, predict_file

    output: Path = chosen["output"]
    check_output(output)
    source = open_source(chosen["file"], chosen["rows_per_request"])
    options = RunOptions(
        chosen["model_version"],
        chosen["outputs"],
        chosen["labels"],
        chosen["keep_errors"],
        chosen["concurrency"],
        sys.stderr.isatty(),
    )
    path = Path(chosen["model"])
    if chosen["url"] is None and not path.exists():
        raise ConfigError(f"{path} does not exist; with --url, MODEL is the name of a model on a server")
    plan = {
        "file": source.fingerprint,
        "model": chosen["model"] if chosen["url"] else _fingerprint(path),
        "url": chosen["url"],
        "version": options.version,
        "outputs": options.outputs,
        "labels": options.labels,
        "keep_errors": options.keep_errors,
        "rows_per_request": chosen["rows_per_request"],
    }
    store = FinishedChunks(output, plan)

    def use(client: Client, model: str) -> str:
        return describe(predict_file(client, model, source, output, store, options), output)

    try:
        if chosen["url"] is None:
            from inferpool.predict_command.local_server import run_with_model

            return run_with_model(path, local_settings(flags, environ), use)
        key = environ.get(KEY_VARIABLE)
        if chosen["key_file"] is not None:
            key = chosen["key_file"].read_text(encoding="utf-8").strip()
        with Client(
            chosen["url"], key=key, ca=chosen["ca_file"], timeout_s=_TIMEOUT_S, retries=_RETRIES
        ) as client:
            return use(client, chosen["model"])
    finally:
        store.close()


def local_settings(flags: dict[str, Any], environ: Mapping[str, str]) -> Settings:
    """Return the settings of a server for this program alone; raises ConfigError."""
    names = [f"{ENV_PREFIX}{name.upper()}" for name in _OWN_SETTINGS]
    own = {name: environ[name] for name in names if name in environ}
    own.setdefault(f"{ENV_PREFIX}LOG_LEVEL", "warning")
    return read_settings({**flags, "engine": "in-process"}, own)


def _fingerprint(path: Path) -> str:
    """Return a text that changes if a file of the model in `path` does."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()
