"""ONNX models in FP16, as they are converted for GPUs; ONNX Runtime runs them on the CPU, too."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inferpool.backends.base import GpuOptions, LoadedModel, LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.backends.onnx.gpu.fp16 import in_half
from inferpool.errors import LoadError
from inferpool.tensors import Array
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.server import ROOT

DIGITS = ROOT / "models" / "digits" / "1" / "model.onnx"
NEXT_WORD = ROOT / "models" / "next-word" / "1" / "model.onnx"
node = helper.make_node


def load(file: Path, kept: Path | None = None, fp16: bool = True) -> LoadedModel:
    return OnnxBackend().load(file, LoadOptions(gpu=GpuOptions(fp16=fp16, cache_dir=kept)))


def value(name: str, shape: list[Any], element: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, element, shape)


def constant(name: str, array: Array) -> Any:
    return numpy_helper.from_array(array, name)


def write(folder: Path, nodes: list[Any], ends: tuple[list[Any], list[Any]], constants: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "g", *ends, constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model, full_check=True)
    file = folder / "model.onnx"
    onnx.save(model, file)
    return file


def operators(folder: Path) -> list[tuple[str, set[int]]]:
    """The kept conversion's operators, each with the element types of its inputs that are weights."""
    [file] = folder.glob("fp16-*/model.onnx")
    graph = onnx.load(file).graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return [(n.op_type, {weights[name] for name in n.input if name in weights}) for n in graph.node]


def faithful(file: Path, folder: Path, rows: dict[str, Array]) -> list[Array]:
    """Runs the converted graph to the letter: ONNX Runtime on the CPU runs much of it in FP32."""
    with in_half(file, folder / "kept") as half:
        onnx.checker.check_model(half, full_check=True)
        outputs: Any = ReferenceEvaluator(onnx.load(half)).run(None, rows)
        return list(outputs)


def images(count: int) -> Array:
    return np.random.default_rng(count).random((count, 1, 8, 8)).astype(np.float32)


def test_weights_and_operations_become_fp16_and_inputs_and_outputs_do_not(tmp_path: Path) -> None:
    """Answers are those of FP32 but for rounding, and they are rounded."""
    exact, half = load(DIGITS, fp16=False), load(DIGITS, tmp_path)
    assert half.signature == exact.signature
    rows = {exact.signature.inputs[0].name: images(16)}
    [name] = exact.signature.outputs_by_name
    want, got = exact.run(rows)[name], half.run(rows)[name]
    assert got.dtype == np.float32
    assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() < 5e-3
    weighted = [elements for kind, elements in operators(tmp_path) if kind in ("Conv", "Gemm")]
    assert weighted
    assert all(elements == {TensorProto.FLOAT16} for elements in weighted)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) < 0.6 * DIGITS.stat().st_size


def test_a_transformer_with_variable_lengths_is_converted(tmp_path: Path) -> None:
    exact, half = load(NEXT_WORD, fp16=False), load(NEXT_WORD, tmp_path)
    assert half.signature == exact.signature
    for tokens in (1, 9, 24):
        ids = np.random.default_rng(tokens).integers(1, 100, (3, tokens))
        rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for name, want in exact.run(rows).items():
            np.testing.assert_allclose(half.run(rows)[name], want, atol=0.01 * np.abs(want).max())


def test_a_converted_model_is_cached(tmp_path: Path) -> None:
    """The second load reads what the first has kept."""
    load(DIGITS, tmp_path)
    [file] = tmp_path.glob("fp16-*/model.onnx")
    written = file.stat().st_mtime_ns
    load(DIGITS, tmp_path)
    assert [*tmp_path.glob("fp16-*/model.onnx")] == [file]
    assert file.stat().st_mtime_ns == written
    assert [folder.name for folder in tmp_path.iterdir()] == [file.parent.name]


@pytest.mark.parametrize("there", [False, True])
def test_a_read_only_cache_does_not_prevent_the_conversion(there: bool, tmp_path: Path) -> None:
    """A folder that cannot be made, for a file stands in its place, and none at all."""
    (tmp_path / "file").touch()
    half = load(DIGITS, tmp_path / "file" / "beside" if there else None)
    assert half.run({half.signature.inputs[0].name: images(2)})


def test_external_data_is_converted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = onnx.load(DIGITS)
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (source / "w.bin").stat().st_size > 100_000
    rows = {load(DIGITS, fp16=False).signature.inputs[0].name: images(4)}
    got, want = load(source / "model.onnx").run(rows), load(DIGITS).run(rows)
    assert {name: tensor.tolist() for name, tensor in got.items()} == {
        name: tensor.tolist() for name, tensor in want.items()
    }


def test_arithmetic_with_shapes_stays_exact(tmp_path: Path) -> None:
    """The mean over 4099 columns, by a division through their number: in FP16 that would be 4100."""
    file = write(
        tmp_path,
        [
            node("Shape", ["x"], ["shape"], start=1, end=2),
            node("Cast", ["shape"], ["columns"], to=TensorProto.FLOAT),
            node("Sub", ["columns", "most"], ["rest"]),
            node("Mul", ["x", "zero"], ["nothing"]),
            node("ReduceMax", ["nothing", "last"], ["base"], keepdims=1),
            node("Add", ["base", "rest"], ["y"]),
        ],
        ([value("x", ["n", "m"])], [value("y", ["n", 1])]),
        [
            constant("most", np.array([4096], np.float32)),
            constant("zero", np.array([0], np.float32)),
            constant("last", np.array([1])),
        ],
    )
    [answer] = faithful(file, tmp_path, {"x": np.ones((2, 4099), np.float32)})
    assert answer.tolist() == [[3.0], [3.0]]


def test_operations_without_fp16_stay_fp32_without_casts_between_them(tmp_path: Path) -> None:
    """The largest of the running sums of 3001 ones: both operators take FP32, and so does the way between."""
    file = write(
        tmp_path,
        [
            node("CumSum", ["x", "axis"], ["sums"]),
            node("TopK", ["sums", "one"], ["most", "index"]),
        ],
        ([value("x", ["n", "m"])], [value("most", ["n", 1]), value("index", ["n", 1], TensorProto.INT64)]),
        [constant("axis", np.array(1)), constant("one", np.array([1]))],
    )
    rows = {"x": np.ones((2, 3001), np.float32)}
    most, index = faithful(file, tmp_path, rows)
    assert most.tolist() == [[3001.0], [3001.0]]
    assert index.tolist() == [[3000], [3000]]
    assert load(file).run(rows)["most"].tolist() == [[3001.0], [3001.0]]


def test_numbers_beyond_fp16_become_infinite(tmp_path: Path) -> None:
    """So that what is measured at load finds it; nothing in the conversion hides it."""
    file = write(
        tmp_path,
        [node("Mul", ["x", "x"], ["square"]), node("Sqrt", ["square"], ["y"])],
        ([value("x", ["n"])], [value("y", ["n"])]),
        [],
    )
    rows = {"x": np.array([300], np.float32)}
    assert load(file, fp16=False).run(rows)["y"].tolist() == [300.0]
    with np.errstate(over="ignore"):
        assert faithful(file, tmp_path, rows)[0].tolist() == [np.inf]


def test_a_broken_file_is_a_load_error(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(LoadError, match=r"model\.onnx cannot be converted to FP16: .+"):
        load(broken, tmp_path / "kept")
    assert not [*(tmp_path / "kept").iterdir()]
    with pytest.raises(LoadError, match="does not exist"):
        load(tmp_path / "missing.onnx")


def test_without_the_package_onnx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("inferpool.backends.onnx.gpu.fp16.version", missing)
    with pytest.raises(LoadError, match=r"gpu\.fp16 needs the package onnx: .*inferpool\[fp16\]"):
        load(DIGITS)


def test_subgraphs_use_values_of_the_outer_graph(tmp_path: Path) -> None:
    """Both branches of an `If` read a value of the outer graph, one of them a weight, too."""
    double = helper.make_graph([node("Mul", ["big", "two"], ["a"])], "then", [], [value("a", ["n", 3])])
    same = helper.make_graph([node("Identity", ["big"], ["b"])], "else", [], [value("b", ["n", 3])])
    file = write(
        tmp_path,
        [
            node("Add", ["x", "one"], ["big"]),
            node("ReduceSum", ["big"], ["sum"], keepdims=0),
            node("Greater", ["sum", "ten"], ["many"]),
            node("If", ["many"], ["y"], then_branch=double, else_branch=same),
        ],
        ([value("x", ["n", 3])], [value("y", ["n", 3])]),
        [
            constant(name, np.array(number, np.float32))
            for name, number in (("one", 1), ("two", 2), ("ten", 10))
        ],
    )
    for number, expected in ((1, 2), (9, 20)):
        rows = {"x": np.full((1, 3), number, np.float32)}
        assert faithful(file, tmp_path, rows)[0].tolist() == [[expected] * 3]
        assert load(file).run(rows)["y"].tolist() == [[expected] * 3]
