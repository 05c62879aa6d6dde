"""`inferpool check`: what it prints, and what it says to change, for models of every kind."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool import cli
from inferpool.import_command import command as import_command
from inferpool.import_command import frameworks
from inferpool.repository.foreign_files import find_conversion
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tests.conftest import MakeChaos
from tests.onnx_models import write_model
from tests.repository.conftest import Check
from tests.server import ROOT


def floats(name: str, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def graph(
    nodes: list[NodeProto],
    taken: tuple[int | str, ...] = ("rows", 4),
    given: tuple[int | str, ...] = ("rows", 4),
    constants: dict[str, np.ndarray] | None = None,
) -> GraphProto:
    """A graph from "x" to "y"."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    return helper.make_graph(nodes, "g", [floats("x", *taken)], [floats("y", *given)], tensors)


def node(kind: str, *inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, [*inputs], ["y"], **attributes)


UNBATCHED = {
    "fixed": (
        graph([node("Identity", "x")], (1, 4), (1, 4)),
        'the first dimension of input "x" is fixed at 1',
        'torch.onnx.export(…, dynamic_shapes=({0: torch.export.Dim("rows")},))',
    ),
    "mixing": (
        graph([helper.make_node("ReduceMax", ["x"], ["top"], axes=[0]), node("Sub", "x", "top")]),
        "rows depend on one another: ReduceMax takes one value over the rows",
        "in the export, call model.eval() first",
    ),
    "constant": (
        # Sequences have no rule, so that the graph cannot be read to its end.
        graph(
            [
                helper.make_node("Mul", ["x", "zero"], ["none"]),
                helper.make_node("SequenceConstruct", ["none"], ["list"]),
                node("ConcatFromSequence", "list", axis=0),
            ],
            constants={"zero": np.zeros(1, np.float32)},
        ),
        "every row that was tried gets the same answer",
        "add a golden sample beside the folders of the versions: samples/one.json",
    ),
    "transposed": (
        graph([node("Transpose", "x")], ("rows", "columns"), ("columns", "rows")),
        'output "y" is [16, 1] for one row',
        'in the model, return one row of "y" for each row of the input',
    ),
    "reshaped": (
        graph([node("Reshape", "x", "shape")], constants={"shape": np.array([1, 4])}),
        'the first dimension of output "y" is fixed at 1',
        'in the model, return one row of "y" for each row of the input, in order, and take the number',
    ),
    "scalar": (
        graph([node("Identity", "x")], (), ()),
        'input "x" is a scalar',
        'in the export, give "x" a first dimension for the rows',
    ),
}


def line_after(output: str, model: str, label: str) -> str:
    """The line of a model's block that begins with `label`."""
    block = output.split(f"{model}/1", 1)[1].split("\n")
    return next(line for line in block if line.startswith(f"  {label}"))


@pytest.fixture(scope="module")
def unbatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of models that cannot be batched, and one that can."""
    folder = tmp_path_factory.mktemp("unbatched")
    for name, (model, _, _) in UNBATCHED.items():
        write_model(folder, name, model)
    write_model(folder, "batched", graph([node("Identity", "x")]))
    write_model(folder, "off", graph([node("Identity", "x")]))
    (folder / "off" / "model.toml").write_text("[batching]\nenabled = false\n")
    return folder


def test_each_model_without_batching_has_the_line_to_change(unbatched: Path, check: Check) -> None:
    output = check(unbatched)
    for name, (_, reason, remedy) in UNBATCHED.items():
        assert reason in line_after(output, name, "batching off: "), name
        assert remedy in line_after(output, name, "change   "), name
    assert (
        line_after(output, "off", "change")
        == '  change   in model.toml, below [batching], remove "enabled = false"'
    )
    assert "change" not in output.split("batched/1")[1].split("constant/1", 1)[0]


def test_the_remedy_is_the_same_from_the_cache(unbatched: Path, check: Check) -> None:
    assert check(unbatched).count("  change ") == len(UNBATCHED) + 1
    assert check(unbatched).count("  change ") == len(UNBATCHED) + 1


def test_remeasure_ignores_the_measurements_that_were_kept(make_chaos: MakeChaos, check: Check) -> None:
    # No other test has a model with this time: it would measure anew what they share in the cache.
    repository = make_chaos("m", run_ms=1.0625)
    first = check(repository)
    assert check(repository) == first, "a kept plan gives the same table to the last digit"
    assert check(repository, "--remeasure") != first
    assert check(repository) != first, "the new measurements are kept"


def test_help_of_check_lists_nothing_that_only_serving_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["check", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "--remeasure" in printed
    assert "--measure-ms" in printed
    for flag in ("--host", "--port", "--drain", "--queue", "--max-body", "--access-log", "--required"):
        assert flag not in printed


FOREIGN = {
    "model.pkl": "inferpool import FILE --example ROWS.csv --to NAME",
    "model.joblib": "inferpool import FILE --example ROWS.csv --to NAME",
    "model.ubj": "inferpool import FILE --example ROWS.csv --to NAME",
    "model.cbm": "inferpool import FILE --example ROWS.csv --to NAME",
    "model.h5": "inferpool import FILE --example ROWS.csv --to NAME",
    "model.hdf5": "inferpool import FILE --example ROWS.csv --to NAME",
    "model.keras": "inferpool import FILE --example ROWS.csv --to NAME",
    "saved_model.pb": "inferpool import FOLDER --example ROWS.npz --to NAME",
    "model.safetensors": "inferpool import FOLDER --example TEXTS.txt --to NAME",
    "model.pth": "inferpool import SCRIPT.py:FUNCTION --weights FILE --trust --example ROWS.npz --to NAME",
    "model.ckpt": "inferpool import SCRIPT.py:FUNCTION --weights FILE --trust --example ROWS.npz --to NAME",
    "model.tflite": "python -m tf2onnx.convert --tflite FILE --output",
    "model.ONNX": "rename it to model.onnx",
}


def remedy_for(remedy: str, file: str, folder: str, name: str) -> str:
    words = {"FILE": file, "FOLDER": folder, "NAME": name}
    return re.sub("|".join(words), lambda word: words[word[0]], remedy)


def test_a_file_of_another_library_in_a_version_is_named_with_its_remedy(
    tmp_path: Path, check: Check
) -> None:
    for number, file in enumerate(FOREIGN):
        folder = tmp_path / f"m{number}" / "1"
        folder.mkdir(parents=True)
        (folder / file).write_bytes(b"something")
    output = check(tmp_path, status=1)
    for number, (file, remedy) in enumerate(FOREIGN.items()):
        [line] = [line for line in output.splitlines() if line.startswith(f"  m{number}/1 has {file}")]
        assert remedy_for(remedy, f"m{number}/1/{file}", f"m{number}/1", f"m{number}") in line
        assert ("--to" in line) == (f"; then remove m{number}/1" in line)


def test_a_file_of_another_library_beside_the_models_is_named_with_its_remedy(
    tmp_path: Path, check: Check
) -> None:
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "good")
    for file in FOREIGN:
        (tmp_path / file).write_bytes(b"something")
    output = check(tmp_path)
    for file, remedy in FOREIGN.items():
        [line] = [line for line in output.splitlines() if f"{file} is skipped: " in line]
        assert remedy_for(remedy, file, ".", Path(file).stem) in line
    pickled = remedy_for(FOREIGN["model.pkl"], "model.pkl", ".", "model")
    assert pickled in check(tmp_path / "model.pkl", status=1)
    shutil.rmtree(tmp_path / "good")
    alone = check(tmp_path, status=1)
    assert "holds no models" in alone
    assert pickled in alone


@pytest.mark.parametrize("file", [file for file, remedy in FOREIGN.items() if remedy.startswith("inferpool")])
def test_a_printed_command_imports_what_it_names(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversions themselves are tested in `tests/import_command`."""
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"something")
    (tmp_path / "SCRIPT.py").touch()
    remedy = find_conversion(folder / file, tmp_path)
    assert remedy is not None
    command = shlex.split(remedy[remedy.index("inferpool import") :].split(";")[0])
    monkeypatch.chdir(tmp_path)
    taken: list[dict[str, Any]] = []

    def take(chosen: dict[str, Any], flags: dict[str, Any], environ: object) -> list[str]:
        taken.append(chosen | flags)
        return []

    monkeypatch.setattr(import_command, "_import", take)
    assert cli.main(command[1:]) == 0
    [chosen] = taken
    assert chosen["to"] == Path("m")
    source = chosen["weights"] or chosen["source"]
    assert Path(source) == Path("m/1", "" if Path(source).is_dir() else file)
    if file == "model.safetensors":
        monkeypatch.setattr(frameworks, "read_folder", lambda path: None)
        (folder / "config.json").touch()
    flags = {"weights": chosen["weights"] is not None, "trusted": chosen.get("trust", False)}
    found = frameworks.recognise_source(chosen["source"], None, **flags)
    assert (tmp_path / found.path).exists()


def test_a_folder_that_is_skipped_is_named_with_what_to_do(tmp_path: Path, check: Check) -> None:
    folders = {"01": "2", "v2": "2", "version-3": "3", "latest": "2", "1" + 18 * "0": "2"}
    for number, folder in enumerate(folders):
        shutil.copytree(ROOT / "models/diabetes", tmp_path / f"m{number}")
        shutil.copytree(tmp_path / f"m{number}" / "1", tmp_path / f"m{number}" / folder)
        (tmp_path / f"m{number}" / "samples-of-mine").mkdir()
    output = check(tmp_path)
    for number, (folder, target) in enumerate(folders.items()):
        [line] = [line for line in output.splitlines() if f"m{number}/{folder} is skipped" in line]
        assert f"rename it to m{number}/{target}" in line
        (tmp_path / f"m{number}" / folder).rename(tmp_path / f"m{number}" / target)
    assert "samples-of-mine" not in output
    output = check(tmp_path)
    assert "is skipped" not in output
    assert "0 of 10 versions have failed" in output
    shutil.rmtree(tmp_path / "m0" / "1")
    (tmp_path / "m0" / "2").rename(tmp_path / "m0" / "01")
    (tmp_path / "m0" / "build.py").unlink()
    (tmp_path / "m0" / "model.toml").touch()
    assert "m0 has no version: expected m0/1/model.onnx; m0/01 is skipped" in check(tmp_path, status=1)


def test_items_that_are_skipped_get_numbers_of_their_own(tmp_path: Path, check: Check) -> None:
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "m")
    items = {"new.onnx": "m/2/model.onnx", "newer.ONNX": "m/3/model.onnx", "v1": "m/4", "v2": "m/5"}
    for item in items:
        if "." in item:
            shutil.copy(tmp_path / "m/1/model.onnx", tmp_path / "m" / item)
        else:
            shutil.copytree(tmp_path / "m/1", tmp_path / "m" / item)
    output = check(tmp_path)
    for item, target in items.items():
        [line] = [line for line in output.splitlines() if f"m/{item} is skipped" in line]
        assert line.endswith(f"to {target}")
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / item).rename(tmp_path / target)
    output = check(tmp_path)
    assert "is skipped" not in output
    assert "0 of 5 versions have failed" in output
