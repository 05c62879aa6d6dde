"""The command `inferpool import`: converts a trained model, compares the answers, and writes a version."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from inferpool.errors import ConfigError, InferpoolError, InvalidInput
from inferpool.release import importers
from inferpool.repository.layout import is_model_name
from inferpool.settings import CHECK_SETTINGS, add_flags
from inferpool.system.files import printable

FRAMEWORKS: Final = {"scikit-learn": "scikit_learn.py", "torch": "torch_program.py"}
_BY_SUFFIX: Final = {
    ".joblib": "scikit-learn", ".pkl": "scikit-learn", ".pickle": "scikit-learn", ".pt2": "torch",
}  # fmt: skip
_SAMPLE_ROWS: Final = 3

if TYPE_CHECKING:
    # It imports numpy, whose threads the command must not start before it serves.
    from inferpool.tensors import Array


def add_import_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `inferpool`."""
    command = commands.add_parser(
        "import",
        help="convert a trained model into a version",
        description="Convert SOURCE, a scikit-learn model of joblib or pickle, or a PyTorch program (.pt2),"
        " to ONNX by the packages of its framework. Compare the answers to the rows of --example with those"
        " of the framework, and write some as golden samples. Nothing is written if they differ.",
        epilog="Loading a pickle runs the code in it: import files of people whom you trust.",
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="SOURCE", type=Path, help="the trained model")
    command.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="the model's folder")
    command.add_argument(
        "--example", required=True, type=Path, metavar="FILE", help="rows without answers: CSV, npy or npz"
    )
    command.add_argument("--from", dest="framework", choices=sorted(FRAMEWORKS), help="[by SOURCE's suffix]")
    command.add_argument("--labels", type=Path, metavar="FILE", help="names of classes, one a line")
    command.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="T", help="largest difference of answers [0.0001]"
    )
    add_flags(command, CHECK_SETTINGS)


def run_import_command(flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    names = ("source", "to", "example", "framework", "labels", "tolerance")
    chosen = {name: flags.pop(name) for name in names}
    try:
        for line in _import(chosen, flags, environ):
            print(printable(line))
        return 0
    except (InferpoolError, OSError, ValueError, ImportError) as error:
        print(f"inferpool: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _import(chosen: dict[str, Any], flags: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    # Late, because these import a lot that no other command needs.
    import numpy as np

    from inferpool.release.build import script_command

    source: Path = chosen["source"]
    target: Path = chosen["to"]
    framework = chosen["framework"] or _BY_SUFFIX.get(source.suffix.lower())
    if framework is None:
        raise ConfigError(f"{source.name}: --from says what it is; expected {', '.join(_BY_SUFFIX)}")
    if not source.is_file():
        raise ConfigError(f"{source} is no file")
    if not is_model_name(target.name):
        raise ConfigError(f"{target.name!r} is no name of a model")
    columns = read_example(chosen["example"])
    with tempfile.TemporaryDirectory(prefix="inferpool-") as temporary:
        work = Path(temporary)
        np.savez(work / "example.npz", **columns)  # type: ignore[arg-type]  # numpy's types want a flag there
        script = Path(importers.__file__).with_name(FRAMEWORKS[framework])
        arguments = [str(source.absolute()), str(work / "example.npz"), str(work)]
        done = subprocess.run(script_command(script, arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "it gave no reason").splitlines()[-1]
            raise InvalidInput(f"{source.name} cannot be converted: {last}")
        about = json.loads((work / "imported.json").read_text())
        names = chosen["labels"].read_text("utf-8").split("\n") if chosen["labels"] else about["classes"]
        with np.load(work / "imported.npz", allow_pickle=False) as loaded:
            inputs = {name[3:]: loaded[name] for name in loaded.files if name.startswith("in:")}
            expected = {name[4:]: loaded[name] for name in loaded.files if name.startswith("out:")}
        folder = work / target.name
        _write_model(folder, work / "model.onnx", about, names, inputs, expected, chosen)
        return _keep(folder, target, inputs, expected, about, chosen, flags, environ)


def read_example(path: Path) -> dict[str, Array]:
    """Return the columns, or arrays, of an example by name; raises InvalidInput and OSError."""
    import numpy as np

    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        try:
            loaded = np.load(path, allow_pickle=False)
            found = {"x": loaded} if suffix == ".npy" else {name: loaded[name] for name in loaded.files}
        except (ValueError, EOFError) as error:
            raise InvalidInput(f"{path.name} has no arrays of numbers or strings: {error}") from None
    elif suffix == ".csv":
        import csv

        with path.open(encoding="utf-8-sig", newline="") as file:
            head, *lines = [row for row in csv.reader(file) if row] or [[]]
        found = {name: _column([line[at] for line in lines]) for at, name in enumerate(head)}
    else:
        raise InvalidInput(f"{path.name}: expected .csv, .npy or .npz")
    if not found or not all(array.ndim and len(array) for array in found.values()):
        raise InvalidInput(f"{path.name} has no rows")
    return found


def _column(texts: Sequence[str]) -> Array:
    import numpy as np

    try:
        return np.array([float(text) for text in texts])
    except ValueError:
        return np.array(texts, np.str_)


def _write_model(
    folder: Path,
    file: Path,
    about: Mapping[str, Any],
    names: Sequence[str] | None,
    inputs: Mapping[str, Array],
    expected: Mapping[str, Array],
    chosen: Mapping[str, Any],
) -> None:
    """Write the model's folder with its first version."""
    (folder / "1").mkdir(parents=True)
    for each in file.parent.glob("model.onnx*"):  # large weights are in a file of their own
        shutil.copyfile(each, folder / "1" / each.name)
    kind = f"{about['kind']} of {about['framework']}, from {chosen['source'].name}"
    table = [f"description = {json.dumps(kind)}"]
    if names:
        (folder / "labels.txt").write_text("\n".join(each for each in names if each) + "\n", "utf-8")
        table += [
            "",
            "[labels]",
            f"output = {json.dumps(about['scores'])}",
            f'activation = "{about["activation"]}"',
        ]
    (folder / "model.toml").write_text("\n".join(table) + "\n", "utf-8")
    (folder / "samples").mkdir()
    sample = {
        "inputs": {name: array[:_SAMPLE_ROWS].tolist() for name, array in inputs.items()},
        "outputs": {name: array[:_SAMPLE_ROWS].tolist() for name, array in expected.items()},
        "tolerance": chosen["tolerance"],
    }
    (folder / "samples" / "imported.json").write_text(json.dumps(sample) + "\n", "utf-8")
    rows = len(next(iter(inputs.values())))
    card = [
        f"# {folder.name}",
        "",
        f"{kind}. Converted by {about['converter']} on {datetime.now(UTC):%Y-%m-%d}.",
        "",
        f"Its answers to {rows} rows of {chosen['example'].name} differ from the framework's by at most "
        f"{chosen['tolerance']:g}; the first {min(rows, _SAMPLE_ROWS)} are golden samples.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(card), "utf-8")


def _keep(
    folder: Path,
    target: Path,
    inputs: Mapping[str, Array],
    expected: Mapping[str, Array],
    about: Mapping[str, Any],
    chosen: Mapping[str, Any],
    flags: dict[str, Any],
    environ: Mapping[str, str],
) -> list[str]:
    """Ask the converted model about every row of the example; keep it if its answers are the framework's."""
    import numpy as np

    try:
        from inferpool.client import Client, Prediction
        from inferpool.predict_command.command import local_settings
        from inferpool.predict_command.local_server import run_with_model
    except ImportError as missing:
        raise ImportError(f"{missing.name} is missing: pip install 'inferpool[client]'") from missing

    def use(client: Client, model: str) -> tuple[Prediction, dict[str, Any]]:
        batching = client.models()[0]["versions"][0].get("batching") or {}
        return client.predict_many(model, dict(inputs)), batching

    answered, batching = run_with_model(folder, local_settings(flags, environ), use)
    worst = 0.0
    for name, values in expected.items():
        got = answered.outputs.get(name)
        if got is None or got.shape != values.shape:
            raise InvalidInput(f'output "{name}" is not as the framework gives it')
        difference = np.abs(got.astype(float) - values.astype(float)).max() if values.size else 0.0
        worst = max(worst, float(difference))
        if not difference <= chosen["tolerance"]:
            raise InvalidInput(
                f'output "{name}" differs from {about["framework"]} by {difference:g},'
                f" more than {chosen['tolerance']:g}"
            )
    number = _move(folder, target)
    rows = len(next(iter(inputs.values())))
    what = f"{about['kind']}, {rows} rows differ from {about['framework']} by {worst:g}"
    lines = [f"{target.name} {number}: {what}"]
    if not batching.get("enabled", True):
        lines.append(f"batching is off: {batching.get('reason')}")
    return lines


def _move(folder: Path, target: Path) -> int:
    """Make `folder` the folder `target`, or its version another one there; returns the version."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, target)
        return 1
    numbers = [int(each.name) for each in target.iterdir() if each.is_dir() and each.name.isdecimal()]
    number = max(numbers, default=0) + 1
    shutil.copytree(folder / "1", target / f".{number}")
    (target / f".{number}").rename(target / str(number))
    return number
