"""`inferpool check`: what it prints, and what it says to change, for models of every kind."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool import cli
from inferpool.observe import logs
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tests.conftest import MakeChaos
from tests.onnx_models import write_model
from tests.server import CHAOS, ROOT

Check = Callable[..., str]


@pytest.fixture
def check(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Check:
    """Run `inferpool check` and return its output and its log; `status` is the exit status that is expected.

    It runs in this process: the imports of one of its own take a second of CPU time.
    """
    monkeypatch.syspath_prepend(CHAOS)
    # Lines go to the handler of this test.
    monkeypatch.setattr(logs, "configure_logs", lambda level, _: caplog.set_level(level.upper()))

    def run(path: Path, *flags: str, status: int = 0) -> str:
        caplog.clear()
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ended = cli.main(
                ["check", str(path), "--measure-ms", "50", "--cache-dir", str(cache_dir), *flags]
            )
        assert ended == status, output.getvalue()
        return output.getvalue() + "".join(f"{message}\n" for message in caplog.messages)

    return run


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
        "add a golden sample beside model.toml: samples/one.json",
    ),
    "transposed": (
        graph([node("Transpose", "x")], ("rows", "columns"), ("columns", "rows")),
        'output "y" is [16, 1] for one row',
        'in the model, return one row of "y" for each row of the input',
    ),
    "reshaped": (
        graph([node("Reshape", "x", "shape")], constants={"shape": np.array([1, 4])}),
        'the first dimension of output "y" is fixed at 1',
        "in the model, take the number of rows from the input",
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
    "model.pkl": "inferpool import FILE --example",
    "model.joblib": "inferpool import FILE --example",
    "model.ubj": "inferpool import FILE --example",
    "model.h5": "inferpool import FILE --example",
    "model.keras": "inferpool import FILE --example",
    "saved_model.pb": "inferpool import FOLDER --example",
    "model.safetensors": "optimum-cli export onnx",
    "model.pth": "inferpool import FILE.py:FUNCTION --weights",
    "model.ONNX": "rename it to model.onnx",
}


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
        assert remedy in line


def test_a_file_of_another_library_beside_the_models_is_named_with_its_remedy(
    tmp_path: Path, check: Check
) -> None:
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "good")
    for file in FOREIGN:
        (tmp_path / file).write_bytes(b"something")
    output = check(tmp_path)
    for file, remedy in FOREIGN.items():
        [line] = [line for line in output.splitlines() if f"{file} is skipped: " in line]
        assert remedy in line
    assert FOREIGN["model.pkl"] in check(tmp_path / "model.pkl", status=1)
    shutil.rmtree(tmp_path / "good")
    alone = check(tmp_path, status=1)
    assert "holds no models" in alone
    assert FOREIGN["model.keras"] in alone


def test_a_folder_that_is_skipped_is_named_with_what_to_do(tmp_path: Path, check: Check) -> None:
    folders = {"01": "2", "v2": "2", "version-3": "3", "latest": "2"}
    for number, folder in enumerate(folders):
        shutil.copytree(ROOT / "models/diabetes", tmp_path / f"m{number}")
        shutil.copytree(tmp_path / f"m{number}" / "1", tmp_path / f"m{number}" / folder)
        (tmp_path / f"m{number}" / "samples-of-mine").mkdir()
    output = check(tmp_path)
    for number, (folder, target) in enumerate(folders.items()):
        [line] = [line for line in output.splitlines() if f"m{number}/{folder} is skipped" in line]
        assert f"rename it to m{number}/{target}" in line
    assert "samples-of-mine" not in output
    shutil.rmtree(tmp_path / "m0" / "1")
    (tmp_path / "m0" / "build.py").unlink()
    (tmp_path / "m0" / "model.toml").touch()
    assert "m0 has no version: expected m0/1/model.onnx; m0/01 is skipped" in check(tmp_path, status=1)


def test_a_model_file_beside_its_versions_is_named(tmp_path: Path, check: Check) -> None:
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "m")
    shutil.copy(tmp_path / "m/1/model.onnx", tmp_path / "m/new.onnx")
    assert "m/new.onnx is skipped" in check(tmp_path)
