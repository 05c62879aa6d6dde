"""The command: `inferpool serve`, `inferpool check` and `inferpool build`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from inferpool import __version__
from inferpool.errors import InferpoolError
from inferpool.release.build import find_script, find_scripts, run_script
from inferpool.repository.catalog import Catalog
from inferpool.repository.layout import DEFAULT_REPOSITORY, build_command, is_unbuilt
from inferpool.settings import ENV_PREFIX, add_flags, read_settings
from inferpool.tensors import shape_text

_EPILOG = f"""\
Flags override {ENV_PREFIX}* variables, variables override the file of --config, the file overrides defaults.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit status is 0, 1 if the command fails, 2 if its arguments are wrong."""
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    command, path, config = flags.pop("command"), flags.pop("repository"), flags.pop("config", None)
    name, options = flags.pop("name", None), flags.pop("options", ())
    try:
        config = config or os.environ.get(ENV_PREFIX + "CONFIG")
        settings = read_settings(flags, os.environ, Path(config) if config else None)
    except InferpoolError as error:
        print(f"inferpool: {error.detail}", file=sys.stderr)
        return 2
    try:
        if command == "build":
            return _build(path, name, options)
        # Imported late, so that --help and wrong arguments are answered at once.
        from inferpool import app
        from inferpool.observe import logs

        if command == "check":
            # The printed report replaces the log, unless the user asked for a log level.
            logs.configure_logs(flags.get("log_level", "error"), "console")
            return _print_check(app.load_all(path, settings), _unbuilt(path))
        return app.serve(path, settings, logs.configure_logs(settings.log_level, settings.log_format))
    except BrokenPipeError:
        # The reader of the output has closed it. Python must not report that when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InferpoolError as error:
        # The log lines that led to the error come first.
        logging.shutdown()
        print(f"inferpool: {error.detail}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inferpool", description="Serve exported models over HTTP.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"inferpool {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary, description in (
        (
            "serve",
            "serve a folder of models",
            "Serve the models in REPOSITORY: a folder of models, one model's folder, or a model file.",
        ),
        (
            "check",
            "load every model, say what it takes and how it batches, and stop",
            "Load everything in REPOSITORY and print each version's signature and batching. "
            "Exits with 1 if a version cannot be served, and says why.",
        ),
    ):
        command = commands.add_parser(
            name, help=summary, description=description, epilog=_EPILOG, allow_abbrev=False
        )
        command.add_argument("repository", type=Path, metavar="REPOSITORY", help="path of the models")
        command.add_argument("--config", metavar="FILE", help=f"TOML file with settings [{ENV_PREFIX}CONFIG]")
        add_flags(command)
    build = commands.add_parser(
        "build",
        help="run a model's build script",
        description="Run the script that builds the model NAME. If a package of the script is not installed, "
        "uv runs the script in an environment with its packages. Without NAME, list the models that have a "
        "build script.",
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
        "options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="go to the script; --help lists its own"
    )
    return parser


def _build(repository: Path, name: str | None, options: Sequence[str]) -> int:
    """Replace this process by the build script of the model `name`, or list the models that have a script."""
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
    """Say of each version what it takes and how it batches; 1 if one has failed."""
    failed = 0
    for model in catalog.models().values():
        for number, view in sorted(model.versions.items()):
            names = f" ({', '.join(view.labels)})" if view.labels else ""
            print(f"{model.name}/{number}{names}: {view.state}")
            if view.signature is None:
                failed += 1
                print(f"  {view.reason}")
                continue
            for kind, specs in (("input", view.signature.inputs), ("output", view.signature.outputs)):
                for spec in specs:
                    left_out = " optional" if spec.optional else ""
                    if spec.name == view.signature.substitute_input and kind == "input":
                        left_out = " in place of every other input"
                    print(f"  {kind:<8} {spec.name}: {spec.datatype} {shape_text(spec.shape)}{left_out}")
            batching = view.batching
            extent = f"up to {batching.max_rows} rows" if batching.enabled else "off"
            print(f"  batching {extent}: {batching.reason}")
            live = catalog.live(view.key)
            count = _counted(len(live.instances), "instance"), _counted(view.threads, "thread")
            print(f"  runs     {count[0]} of {count[1]} by {view.backend}")
            for line in live.latency:
                print(f"           {line.rows:5.0f} rows in {1000 * line.seconds:9.3f} ms")
    for folder in unbuilt:
        print(f"{folder.name}: not built yet; {build_command(folder)}")
    print(
        f"{failed} of {sum(len(model.versions) for model in catalog.models().values())} versions have failed"
    )
    return 1 if failed else 0


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
