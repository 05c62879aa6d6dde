"""What `inferpool check` says to change is changed, as it is printed, and the fault is gone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from tests.onnx_models import write_model
from tests.repository.conftest import Check

OPEN: Final = ("rows", 4)
SAMPLE: Final = "samples/one.json"
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def floats(name: str, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def graph(
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    output: ValueInfoProto,
    constants: dict[str, Any] | None = None,
) -> GraphProto:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    return helper.make_graph(nodes, "g", inputs, [output], tensors)


def node(kind: str, *inputs: str, called: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(kind, [*inputs], [called], **attributes)


def identity(*shape: int | str) -> GraphProto:
    return graph([node("Identity", "x")], [floats("x", *shape)], floats("y", *shape))


def with_defaults(*names: str) -> GraphProto:
    constants = {name: np.zeros((1, 4), np.float32) for name in names}
    return graph([node("Identity", "x")], [floats("x", *OPEN)], floats("y", *OPEN), constants)


def list_of_tensors() -> GraphProto:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, OPEN))
    made = node("SequenceConstruct", "x")
    return graph([made], [floats("x", *OPEN)], helper.make_value_info("y", kind))


def normalised(axis: int) -> GraphProto:
    nodes = [node("ReduceMax", "x", called="top", axes=[axis]), node("Sub", "x", "top")]
    return graph(nodes, [floats("x", *OPEN)], floats("y", *OPEN))


def mean(axes: list[int]) -> GraphProto:
    nodes = [node("ReduceMean", "x", axes=axes, keepdims=0)]
    return graph(nodes, [floats("x", *OPEN)], floats("y", *OPEN[: 2 - len(axes)]))


def transposed() -> GraphProto:
    return graph([node("Transpose", "x")], [floats("x", "rows", "columns")], floats("y", "columns", "rows"))


def reshaped(rows: int) -> GraphProto:
    nodes = [node("Reshape", "x", "shape")]
    return graph(nodes, [floats("x", *OPEN)], floats("y", "a", "b"), {"shape": np.array([rows, 4])})


def noisy() -> GraphProto:
    nodes = [node("RandomNormalLike", "x", called="noise"), node("Add", "x", "noise")]
    return graph(nodes, [floats("x", *OPEN)], floats("y", *OPEN))


def noise_given() -> GraphProto:
    return graph(
        [node("Add", "x", "noise")], [floats("x", *OPEN), floats("noise", *OPEN)], floats("y", *OPEN)
    )


def picky() -> GraphProto:
    """Takes 77 columns, which its input does not declare."""
    shape = {"shape": np.array([-1, 7, 11])}
    taken = [floats("x", "rows", "columns")]
    return graph([node("Reshape", "x", "shape")], taken, floats("y", "rows", 7, 11), shape)


def needle() -> GraphProto:
    """Tells only one number from all others. A sequence keeps the graph from being read to its end."""
    nodes = [
        node("Equal", "x", "number", called="found"),
        node("Cast", "found", called="cast", to=TensorProto.FLOAT),
        node("SequenceConstruct", "cast", called="list"),
        node("ConcatFromSequence", "list", axis=0),
    ]
    return graph(nodes, [floats("x", *OPEN)], floats("y", *OPEN), {"number": np.array([1234.5], np.float32)})


def sample(row: list[float], output: Any) -> Mapping[str, str]:
    return {SAMPLE: json.dumps({"inputs": [row], "outputs": {"y": [output]}})}


class Case(NamedTuple):
    """A model whose rows share no run, the line that `check` prints, and the model that follows it.

    `files` are those that the line says to write beside the versions.
    """

    before: GraphProto
    line: str
    after: GraphProto
    files: Mapping[str, str] = NOTHING


COLUMNS = [float(number) for number in range(77)]
CASES = {
    "fixed": Case(identity(1, 4), 'leave the first dimension of "x" open', identity(*OPEN)),
    "scalar": Case(identity(), 'give "x" a first dimension for the rows', identity("rows")),
    "default": Case(with_defaults("x"), "give no default to the input", with_defaults()),
    "list": Case(list_of_tensors(), "return tensors only", identity(*OPEN)),
    "mixing": Case(normalised(0), "compute each row by itself", normalised(1)),
    "mean": Case(mean([0, 1]), "without a mean", mean([1])),
    "lost": Case(transposed(), 'return one row of "y" for each row of the input', identity(*OPEN)),
    "reshaped": Case(reshaped(1), "or -1 in a reshape", reshaped(-1)),
    "noisy": Case(noisy(), "take random numbers as an input", noise_given()),
    "picky": Case(picky(), SAMPLE, picky(), sample(COLUMNS, np.reshape(COLUMNS, (7, 11)).tolist())),
    "needle": Case(needle(), SAMPLE, needle(), sample([1234.5, 0, 0, 0], [1, 0, 0, 0])),
}


def block_of(output: str, model: str) -> list[str]:
    """The lines about version 1 of a model."""
    return re.split(r"\n(?! )", output.split(f"{model}/1: ", 1)[1], maxsplit=1)[0].splitlines()


def change(output: str, model: str) -> str:
    """The line that says what to change."""
    [line] = [line for line in block_of(output, model) if line.startswith("  change   ")]
    return line


def is_batched(output: str, model: str) -> bool:
    return any(line.startswith("  batching up to ") for line in block_of(output, model))


def write_beside(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_a_model_that_is_changed_as_check_says_is_batched(tmp_path: Path, check: Check) -> None:
    for name, case in CASES.items():
        write_model(tmp_path, name, case.before)
        write_model(tmp_path, f"{name}-after", case.after)
        write_beside(tmp_path / f"{name}-after", case.files)
    write_model(tmp_path, "off", identity(*OPEN))
    write_beside(tmp_path / "off", {"model.toml": "[batching]\nenabled = false\n"})
    unranked = write_model(tmp_path, "unranked", identity(*OPEN))
    proto = onnx.load(unranked)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    onnx.save(proto, unranked)
    output = check(tmp_path)
    for name, case in CASES.items():
        assert case.line in change(output, name), name
        assert is_batched(output, f"{name}-after"), name
    assert 'give "x" a shape that begins with an open dimension' in change(output, "unranked")
    assert 'remove "enabled = false"' in change(output, "off")
    (tmp_path / "off" / "model.toml").write_text("[batching]\n")
    assert is_batched(check(tmp_path / "off"), "off")


def test_a_bare_file_gets_a_folder_before_it_gets_a_sample(tmp_path: Path, check: Check) -> None:
    write_model(tmp_path, "made", picky()).rename(tmp_path / "net.onnx")
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "linked.onnx").symlink_to(tmp_path / "net.onnx")
    output = check(tmp_path)
    assert "first move net.onnx to net/1/model.onnx" in change(output, "net")
    assert "first move linked.onnx to linked/1/model.onnx" in change(output, "linked")
    (tmp_path / "linked.onnx").unlink()
    (tmp_path / "net" / "1").mkdir(parents=True)
    file = (tmp_path / "net.onnx").rename(tmp_path / "net" / "1" / "model.onnx")
    assert "name the folder net, not its file 1/model.onnx" in change(check(file), "net")
    write_beside(tmp_path / "net", CASES["picky"].files)
    assert is_batched(check(tmp_path / "net"), "net")


def test_the_lines_of_model_toml_for_torchscript_are_printed_to_be_copied(
    tmp_path: Path, check: Check
) -> None:
    import torch

    class Relu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    class Columns(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x[:, column] for column in range(x.shape[1])]

    file = tmp_path / "m" / "1" / "model.pt"
    file.parent.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Relu()), str(file))
        torch.jit.save(torch.jit.script(Columns()), str(tmp_path / "columns.pt"))
    refused = check(file, status=1)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f'sha256 = ["{digest}"]' in refused
    assert "name the folder m, not its file 1/model.pt" in refused
    config = tmp_path / "m" / "model.toml"
    config.write_text(f'sha256 = ["{digest}"]\n')
    lines = "\n".join(line[2:] for line in block_of(check(tmp_path / "m", status=1), "m")[2:])
    assert lines.startswith('[[inputs]]\nname = "x"')
    config.write_text(f'sha256 = ["{digest}"]\n{lines.replace("[-1, 64]", "[1, 4]")}\n')
    assert 'below [[inputs]] of "x", let shape begin with -1' in change(check(tmp_path / "m"), "m")
    config.write_text(f'sha256 = ["{digest}"]\n{lines}\n')
    assert is_batched(check(tmp_path / "m"), "m")
    # A list with as many tensors as there are columns, which no sample makes a tensor.
    (tmp_path / "columns.pt").rename(file)
    config.write_text(lines.replace("64", "-1"))
    assert "return tensors only" in change(check(tmp_path / "m", "--trust"), "m")
