"""The command `inferpool import`: converts a trained model, compares the answers, and writes a version."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from inferpool.command_output import print_failure
from inferpool.errors import ConfigError, InferpoolError
from inferpool.import_command.frameworks import SCRIPTS, recognise_source
from inferpool.repository.layout import is_model_name
from inferpool.settings_sources import CHECK_SETTINGS, add_flags
from inferpool.system.files import printable
from inferpool.system.install_hints import install_command

_STEPS: Final = 3
"""Steps that the progress bar counts: the conversion, the load and the comparison."""
_ANY_DIFFERENCE: Final = 1e30
"""The tolerance of the golden sample until the answers are compared: the comparison names both frameworks."""


def add_import_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `inferpool`."""
    command = commands.add_parser(
        "import",
        help="convert a trained model into a version",
        description="Convert SOURCE, a trained model of scikit-learn, XGBoost, LightGBM, CatBoost, Keras,"
        " TensorFlow, PyTorch or Hugging Face, to ONNX with the packages of its framework. Compare the"
        " answers to the rows of --example with those of the framework, and write some as golden samples."
        " Nothing is written if they differ.",
        epilog="Loading a pickle runs the code in it: import files of people whom you trust.",
        allow_abbrev=False,
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="the trained model: a file, a folder of TensorFlow or Hugging Face, or FILE.py:FUNCTION",
    )
    command.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="the model's folder")
    command.add_argument(
        "--example",
        required=True,
        type=Path,
        metavar="FILE",
        help="rows without answers: CSV, npy, npz, or texts in .txt",
    )
    command.add_argument(
        "--from", dest="framework", choices=sorted(SCRIPTS), help="framework of SOURCE [by its suffix]"
    )
    command.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a state_dict for the module that FILE.py:FUNCTION returns",
    )
    command.add_argument(
        "--cache",
        action="store_true",
        help="a causal language model of Hugging Face takes tokens and its cache, and returns the cache",
    )
    command.add_argument(
        "--environment",
        choices=("auto", "own", "here"),
        default="auto",
        help="where the framework runs: in an environment of its own, which uv makes and keeps; here; or here"
        " if the packages are installed, else in its own [auto]",
    )
    command.add_argument("--labels", type=Path, metavar="FILE", help="names of classes, one a line")
    command.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="T",
        help="largest difference of answers, absolute or relative [0.0001]",
    )  # fmt: skip
    add_flags(command, CHECK_SETTINGS)


def run_import_command(flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    names = ("source", "to", "example", "framework", "weights", "cache", "environment", "labels",
             "tolerance")  # fmt: skip
    chosen = {name: flags.pop(name) for name in names}
    try:
        for line in _import(chosen, flags, environ):
            print(printable(line))
        return 0
    except (InferpoolError, OSError, ValueError, ImportError) as error:
        return print_failure(error)


def _import(chosen: dict[str, Any], flags: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    target: Path = chosen["to"]
    weights: Path | None = chosen["weights"]
    tolerance: float = chosen["tolerance"]
    try:
        from inferpool.client import Client, Prediction
        from inferpool.predict_command.command import local_settings
        from inferpool.predict_command.local_server import run_with_model
    except ImportError as missing:
        raise ImportError(f"{missing.name} is missing: {install_command('client')}") from missing
    settings = local_settings(flags, environ)
    source = recognise_source(
        chosen["source"], chosen["framework"], weights=weights is not None, trusted=settings.trust
    )
    if chosen["cache"] and source.framework != "hugging-face":
        raise ConfigError(f"--cache is for folders of Hugging Face; {source.name} is none")
    if not is_model_name(target.name):
        raise ConfigError(f"{target.name!r} is no name of a model")
    if weights is not None and not weights.is_file():
        raise ConfigError(f"{weights} is no file")
    # Late, because these import a lot that no other command needs.
    from inferpool.import_command.comparison import compare_answers
    from inferpool.import_command.conversion_run import run_conversion
    from inferpool.import_command.example import read_example
    from inferpool.import_command.imported_model import add_version, write_model, write_sample

    example = read_example(chosen["example"])
    options = [] if weights is None else ["--weights", str(weights.absolute())]
    options += ["--cache"] if chosen["cache"] else []
    with tempfile.TemporaryDirectory(prefix="inferpool-") as temporary, _progress() as bar:
        work = Path(temporary)
        bar.set_description(f"converting {source.name}")
        converted = run_conversion(
            source,
            example,
            work,
            options,
            chosen=chosen["framework"] is not None,
            environment=chosen["environment"],
            refresh=bar.refresh,
        )
        about = converted.about
        names = read_labels(chosen["labels"]) if chosen["labels"] else about["classes"]
        folder = work / target.name
        write_model(folder, converted, names, source.name, chosen["example"].name, tolerance)
        write_sample(folder, converted, _ANY_DIFFERENCE)
        bar.update()
        bar.set_description("loading")

        def use(client: Client, model: str) -> tuple[Prediction, dict[str, Any]]:
            batching = client.models()[0]["versions"][0].get("batching") or {}
            bar.update()
            bar.set_description("comparing")
            return client.predict_many(model, dict(converted.inputs)), batching

        answered, batching = run_with_model(folder, settings, use)
        worst = compare_answers(answered.outputs, converted.expected, tolerance, about["framework"])
        write_sample(folder, converted, tolerance)
        number = add_version(folder, target)
        bar.update()
    rows = len(next(iter(converted.inputs.values())))
    what = f"{about['kind']}, {rows} rows differ from {about['framework']} by {worst:g}"
    lines = [f"{target.name} {number}: {what}"]
    if not batching.get("enabled", True):
        lines.append(f"batching is off: {batching.get('reason')}")
    return lines


def read_labels(file: Path) -> Sequence[str]:
    """Return the names of classes in a file, one a line; raises OSError and ValueError."""
    return [line for line in file.read_text("utf-8").splitlines() if line]


@contextmanager
def _progress() -> Iterator[Any]:
    """Show a bar of the steps, with the time, if people see this program's output."""
    from tqdm.auto import tqdm

    with tqdm(total=_STEPS, unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar
