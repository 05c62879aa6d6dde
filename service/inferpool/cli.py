"""The command: `inferpool serve`, `check`, `fetch`, `build`, `predict`, `evaluate`, `key` and others."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from inferpool import __version__
from inferpool.errors import ConfigError, InferpoolError
from inferpool.platforms import REPOSITORY_VARIABLE, find_repository, platform_settings
from inferpool.repository.layout import DEFAULT_REPOSITORY, build_command, is_unbuilt
from inferpool.repository.stores.reference import StoreReference, parse_repository
from inferpool.settings import Settings
from inferpool.settings_sources import CHECK_SETTINGS, ENV_PREFIX, FETCH_SETTINGS, add_flags, read_settings
from inferpool.system.files import printable

if TYPE_CHECKING:
    # These import a lot, which only some commands need.
    from inferpool.repository.catalog import Catalog, LiveView, VersionView
    from inferpool.tensors import Signature

OWN_COMMANDS = ("serve", "check", "fetch", "build")
_REPOSITORY = "path of the models, or their place in a store"
_EPILOG = f"""\
Flags override {ENV_PREFIX}* variables, variables override the file of --config, the file overrides defaults.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser(whole=words[:1] != ["serve"])
    flags = vars(parser.parse_args(words))
    command = flags.pop("command")
    if command == "key":
        try:
            return _key(**flags)
        except (InferpoolError, ValueError) as error:
            print(f"inferpool: {printable(str(error))}", file=sys.stderr)
            return 1
    if command not in OWN_COMMANDS:
        from inferpool.other_commands import run_other_command

        return run_other_command(command, flags, os.environ)
    argument, config = flags.pop("repository"), flags.pop("config", None)
    name, options = flags.pop("name", None), flags.pop("options", ())
    remeasure = flags.pop("remeasure", False)
    if command == "serve":
        # numpy reads this when it is imported, and only explanations use its linear algebra. Threads of that
        # would spin on the cores that the models need, for matrices that are too small to gain from them.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        config = config or os.environ.get(ENV_PREFIX + "CONFIG")
        location = find_repository(argument, os.environ)
        platform = platform_settings(location, os.environ) if command == "serve" else {}
        settings = read_settings(flags, os.environ, Path(config) if config else None, platform)
        repository = parse_repository(location.text)
    except InferpoolError as error:
        print(f"inferpool: {printable(error.detail)}", file=sys.stderr)
        return 2
    try:
        if command == "build":
            return _build(argument, name, options)
        # Imported late, so that --help and mistakes answer at once.
        from inferpool.observe import logs

        if command == "fetch":
            logs.configure_logs(settings.log_level, settings.log_format)
            path = _local(repository, settings)
            if not path.exists():
                raise ConfigError(f"{path} does not exist")
            print(path)
            return 0
        if command == "check":
            from inferpool import app

            # The output has everything that is logged below a warning, unless the user asks for the log.
            logs.configure_logs(settings.log_level, "console")
            path = _local(repository, settings)
            return _print_check(app.load_all(path, settings, remeasure=remeasure), _unbuilt(path))
        from inferpool.engine.spawn import SUPERVISED

        # Clients may connect from the moment the server listens. A signal waits until the server can answer
        # it, and no thread may take it: those of libraries start when they are imported.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISED)
        try:
            from inferpool import launch

            return launch.serve(repository, settings, None if argument is not None else location.reason)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except BrokenPipeError:
        # The reader of the output has closed it. Python must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InferpoolError as error:
        # The log lines that led to the error come first.
        logging.shutdown()
        print(f"inferpool: {printable(error.detail)}", file=sys.stderr)
        return 1


def _parser(*, whole: bool = True) -> argparse.ArgumentParser:
    """The parser of all commands; without `whole`, of `serve` alone, which starts sooner without the rest."""
    parser = argparse.ArgumentParser(
        prog="inferpool", description="Serve exported models over HTTP.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"inferpool {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a folder of models",
        description="Serve the models in REPOSITORY: a folder of models, a model's folder, or a model file;"
        " or the same in a store: s3://bucket/models, gs://…, az://container/…, https://host/models.tar.gz,"
        " hf://owner/name@revision or oci://registry/name:tag.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _add_repository(serve)
    add_flags(serve)
    if whole:
        _add_others(commands)
    return parser


def _add_others(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add every command but `serve`."""
    from inferpool.other_commands import add_server_commands, add_work_commands

    check = commands.add_parser(
        "check",
        help="load every model, print its inputs, outputs and batching, and stop",
        description="Load everything in REPOSITORY and print each version's inputs, outputs and batching. If"
        " batching is off, print what to change. Exits with 1 if a version cannot be served, and says why.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _add_repository(check)
    check.add_argument(
        "--remeasure", action="store_true", help="measure every model again, whatever the cache holds"
    )
    check.add_argument(
        "--log-level",
        choices=get_args(Settings.model_fields["log_level"].annotation),
        default="warning",
        help="least severe level that is logged (default: warning)",
    )
    add_flags(check, CHECK_SETTINGS)
    fetch = commands.add_parser(
        "fetch",
        help="fetch models from a store into the cache",
        description="Fetch the models that REPOSITORY names in a store into the cache, and print their"
        " folder. `serve` does the same first; with models that are in an image, it fetches nothing.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _add_repository(fetch)
    add_flags(fetch, FETCH_SETTINGS)
    build = commands.add_parser(
        "build",
        help="run a model's build script",
        description="Run the script that builds the model NAME. If a package of the script is not installed"
        " here, uv runs the script in an environment with its packages. Without NAME, list the models that"
        " have a script.",
        usage="inferpool build [-h] [--repository FOLDER] [NAME [OPTIONS ...]]",
        allow_abbrev=False,
    )
    build.add_argument(
        "--repository",
        type=Path,
        default=DEFAULT_REPOSITORY,
        metavar="FOLDER",
        help=f"path of the models (default: {DEFAULT_REPOSITORY})",
    )
    build.add_argument("name", nargs="?", metavar="NAME", help="the model's folder in the repository")
    build.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="OPTIONS",
        help="options of the script (see NAME --help)",
    )
    add_work_commands(commands)
    _add_key(commands)
    add_server_commands(commands)


def _add_key(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `key` and its own commands."""
    key = commands.add_parser(
        "key",
        help="make, list and revoke keys",
        description="Make, list and revoke the keys of a server. The file of keys has digests only; a server"
        " that runs with this file takes changes within seconds.",
        allow_abbrev=False,
    )
    actions = key.add_subparsers(dest="action", required=True, metavar="ACTION", help="new, list or revoke")
    new = actions.add_parser(
        "new",
        help="make a key, print it, and add its digest to the file",
        description="Make a key, print it once, and add its digest to the file of keys. A missing file is"
        " made.",
        allow_abbrev=False,
    )
    new.add_argument("--tenant", required=True, metavar="TENANT", help="whom the key belongs to")
    new.add_argument(
        "--scope",
        action="append",
        required=True,
        dest="scopes",
        metavar="SCOPE",
        help="what the key allows: predict (every model), predict:MODEL, read (models and docs), metrics, or"
        " admin; may be repeated",
    )
    new.add_argument("--expires", metavar="SPAN", help="time after which the key expires: 90d, 12h or 30m")
    listing = actions.add_parser(
        "list",
        help="list the keys in the file",
        description="List the keys in the file: id, tenant, expiry (UTC) and scopes.",
        allow_abbrev=False,
    )
    revoke = actions.add_parser(
        "revoke",
        help="remove a key from the file",
        description="Remove a key from the file. Servers refuse it within seconds.",
        allow_abbrev=False,
    )
    revoke.add_argument("key_id", metavar="ID", help="the key's id, which `inferpool key list` prints")
    for action in (new, listing, revoke):
        action.add_argument(
            "--keys-file",
            type=Path,
            default=os.environ.get(ENV_PREFIX + "KEYS_FILE"),
            metavar="FILE",
            help=f"file of keys [{ENV_PREFIX}KEYS_FILE]",
        )


def _add_repository(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "repository",
        nargs="?",
        metavar="REPOSITORY",
        help=f"{_REPOSITORY} [{REPOSITORY_VARIABLE}; default: where a platform mounts them, or /models]",
    )
    command.add_argument("--config", metavar="FILE", help=f"TOML file with settings [{ENV_PREFIX}CONFIG]")


def _key(
    action: str,
    keys_file: Path | str | None,
    tenant: str = "",
    scopes: Sequence[str] = (),
    expires: str | None = None,
    key_id: str = "",
) -> int:
    """Make, list or revoke keys; raises InferpoolError or ValueError."""
    # Imported late, so that --help and mistakes answer at once.
    from inferpool.http.access.key_file import append_key, expiry_after, new_key, read_key_file, remove_key

    if keys_file is None:
        raise ValueError(f"no file of keys is named; use --keys-file or {ENV_PREFIX}KEYS_FILE")
    file = Path(keys_file)
    now = datetime.now(UTC)
    if action == "new":
        key, record = new_key(tenant, scopes, None if expires is None else expiry_after(expires, now))
        append_key(file, record)
        until = (
            "does not expire" if record.expires is None else f"expires {record.expires:%Y-%m-%d %H:%M} UTC"
        )
        # The key alone goes to the standard output, so that a script can take it from there.
        print(
            f"key {record.id} of {tenant} is in {printable(str(file))}; it {until}, and is shown only now:",
            file=sys.stderr,
        )
        print(key)
    elif action == "revoke":
        record = remove_key(file, key_id)
        print(f"key {record.id} of {record.tenant} is revoked")
    else:
        for record in read_key_file(file):
            expired = record.expires is not None and record.expires <= now
            until = "never" if record.expires is None else f"{record.expires.astimezone(UTC):%Y-%m-%d %H:%M}"
            _say(
                f"{record.id:<10} {record.tenant:<20} {until:<17}{'expired  ' if expired else ''}"
                f"{' '.join(record.scopes)}"
            )
    return 0


def _local(repository: Path | StoreReference, settings: Settings) -> Path:
    """The folder of a repository; that of a store is filled first. Raises StoreError."""
    if isinstance(repository, Path):
        return repository
    from inferpool.repository.stores.fetch_process import fetch_models

    return fetch_models(repository, settings).path


def _build(repository: Path, name: str | None, options: Sequence[str]) -> int:
    """Replace this process by the build script of the model `name`, or list the models that have a script."""
    from inferpool.release.build import find_script, find_scripts, run_script

    if name is not None:
        run_script(find_script(repository, name), options)
    scripts = find_scripts(repository)
    width = max(len(script.name) for script in scripts)
    for script in scripts:
        print(f"{script.name:<{width}}  {'built    ' if script.built else 'not built'}  {script.description}")
    return 0


def _unbuilt(path: Path) -> list[Path]:
    """The folders of the repository `path` that are left out until they are built."""
    return [item for item in sorted(path.iterdir()) if is_unbuilt(item)] if path.is_dir() else []


def _print_check(catalog: Catalog, unbuilt: Sequence[Path]) -> int:
    """Print each version's inputs, outputs and batching; returns 1 if a version has failed."""
    models = catalog.models().values()
    views = [view for model in models for _, view in sorted(model.versions.items())]
    for view in views:
        names = f" ({', '.join(view.labels)})" if view.labels else ""
        _say(f"{view.key.model}/{view.key.version}{names}: {view.state}")
        if view.signature is None:
            for line in view.reason.splitlines():
                _say(f"  {line}")
        else:
            _print_signature(view.signature)
            _print_batching(view)
            _print_runs(view, catalog.live(view.key))
    for folder in unbuilt:
        _say(f"{folder.name}: not built yet; {build_command(folder)}")
    failed = sum(view.signature is None for view in views)
    _say(f"{failed} of {len(views)} versions have failed")
    return 1 if failed else 0


def _print_signature(signature: Signature) -> None:
    from inferpool.tensors import shape_text

    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            note = " optional" if spec.optional else ""
            if spec.name == signature.substitute_input and kind == "input":
                note = " in place of every other input"
            _say(f"  {kind:<8} {spec.name}: {spec.datatype} {shape_text(spec.shape)}{note}")


def _print_batching(view: VersionView) -> None:
    batching = view.batching
    extent = f"up to {_counted(batching.max_rows, 'row')}" if batching.enabled else "off"
    _say(f"  batching {extent}: {batching.reason}")
    if batching.remedy is not None:
        _say(f"  change   {batching.remedy}")


def _print_runs(view: VersionView, live: LiveView) -> None:
    instances, threads = _counted(len(live.instances), "instance"), _counted(view.threads, "thread")
    _say(f"  runs     {instances} of {threads} by {view.backend}")
    for line in live.latency:
        if line.rows >= 1:  # rows of smaller sizes count as less than one
            rows = "row " if round(line.rows) == 1 else "rows"
            _say(f"           {line.rows:5.0f} {rows} in {1000 * line.seconds:9.3f} ms")
    if view.row_cost is not None:
        for point in filter(lambda point: point.seconds, view.row_cost.points):
            cost = f"{1000 * point.seconds:9.3f} ms, as {view.row_cost.load(point.elements):.3g} rows"
            _say(f"           {point.elements} elements a row in {cost}")


def _say(line: str) -> None:
    """Print a line. Names in it come from files, and must not be able to control a terminal."""
    print(printable(line))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
