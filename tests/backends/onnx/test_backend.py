"""Any tensor that ONNX Runtime runs goes through the backend as through the runtime itself."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import hypothesis.extra.numpy as npst
import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.backends.onnx.signature import DATATYPES
from inferpool.errors import LoadError
from inferpool.system.memory import memory_use
from inferpool.tensors import ANY, DTYPES, JSON, Array, TensorSpec
from onnx import TensorProto, helper

from tests import onnx_models
from tests.backends.onnx.saved_models import load
from tests.onnx_models import bf16, constant, identity, model, tensor_type, value, value_of

ROOT: Final = Path(__file__).parents[3]
TEXT: Final = st.text(st.characters(codec="utf-8"), max_size=8)
node = helper.make_node


def alone(file: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime without anything around it."""
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def same(one: Array, other: Array) -> bool:
    """Equal in datatype, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tolist() == other.tolist() if one.dtype == np.object_ else one.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """For each datatype a model that gives back a tensor of any shape."""
    folder = tmp_path_factory.mktemp("identities")
    return {datatype: load(identity(datatype, None), folder / datatype) for datatype in DTYPES}


def tensors_of(datatype: str, **sides: int) -> st.SearchStrategy[Array]:
    """Tensors of any shape up to rank 4, holding any bits that the datatype can hold."""
    shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, **{"max_side": 3, **sides})
    if datatype == "BYTES":
        return npst.arrays(np.object_, shapes, elements=TEXT, fill=st.nothing())
    if datatype == "BOOL":
        return npst.arrays(np.bool_, shapes)
    dtype = DTYPES[datatype]
    bits = npst.arrays(np.dtype(f"u{dtype.itemsize}"), shapes, fill=st.nothing())
    return bits.map(lambda array: array.view(dtype))


def test_the_runtime_has_every_datatype_of_the_protocol() -> None:
    assert set(DATATYPES.values()) == set(DTYPES) == set(onnx_models.ELEMENTS)


@pytest.mark.parametrize("datatype", DTYPES)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_every_datatype_survives_a_round_trip(
    identities: dict[str, LoadedModel], datatype: str, data: st.DataObject
) -> None:
    tensor = data.draw(tensors_of(datatype))
    assert same(identities[datatype].run({"x": tensor})["y"], tensor)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT))
def test_strings_may_be_empty_and_hold_any_character(
    identities: dict[str, LoadedModel], texts: list[str]
) -> None:
    texts = ["", "\0", "a\0b\0", "naïve 漢字 😀", *texts]
    assert identities["BYTES"].run({"x": np.array(texts, np.object_)})["y"].tolist() == texts


def unaligned(tensor: Array) -> Array:
    """The same elements in read-only memory, at an odd address where the datatype has such."""
    if tensor.dtype == np.object_:
        return tensor
    shifted: Array = np.frombuffer(b"-" + tensor.tobytes(), tensor.dtype, tensor.size, 1)
    return shifted.reshape(tensor.shape)


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "INT64", "FP16", "BF16", "FP32", "BYTES"])
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda tensor: tensor.T,
        lambda tensor: tensor[::2, ::3],
        lambda tensor: tensor[::-1, 1:],
        lambda tensor: np.asfortranarray(tensor),
        lambda tensor: np.broadcast_to(tensor[:1, :1], (3, 2)),
        unaligned,
    ],
    ids=["transposed", "strided", "reversed", "fortran", "broadcast", "unaligned"],
)
def test_the_layout_in_memory_changes_nothing(
    identities: dict[str, LoadedModel], datatype: str, laid_out: Callable[[Array], Array]
) -> None:
    numbers = np.arange(24).reshape(4, 6)
    if datatype == "BYTES":
        tensor = np.array([str(number) for number in numbers.flat], np.object_).reshape(numbers.shape)
    else:
        tensor = (numbers % 2 if datatype == "BOOL" else numbers).astype(DTYPES[datatype])
    taken = laid_out(tensor)
    before = taken.copy()
    assert same(identities[datatype].run({"x": taken})["y"], before)
    assert same(taken, before)


def test_outputs_equal_those_of_the_runtime_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = constant("w", "FP32", rng.standard_normal((5, 3)).astype(np.float32))
    built = model(
        [
            node("MatMul", ["x", "w"], ["product"]),
            node("Softmax", ["product"], ["scores"]),
            node("ArgMax", ["scores"], ["class"], axis=1),
            node("Cast", ["product"], ["half"], to=TensorProto.FLOAT16),
        ],
        [value("x", "FP32", ["n", 5])],
        [value("scores", "FP32", ["n", 3]), value("class", "INT64", None), value("half", "FP16", None)],
        [weights],
    )
    loaded = load(built, tmp_path)
    session = alone(tmp_path / "model.onnx")
    x = rng.standard_normal((7, 5)).astype(np.float32)
    outputs = loaded.run({"x": x})
    assert list(outputs) == ["scores", "class", "half"]
    for got, want in zip(outputs.values(), session.run(None, {"x": x}), strict=True):
        assert same(got, want)


# Outputs.


def test_only_the_requested_outputs_are_returned_in_order(tmp_path: Path) -> None:
    given = [value(name, "FP32", ["n"]) for name in ("a", "b", "c")]
    built = model([node("Identity", ["x"], [out.name]) for out in given], [value("x", "FP32", ["n"])], given)
    loaded = load(built, tmp_path)
    x = np.ones(2, np.float32)
    assert list(loaded.run({"x": x})) == ["a", "b", "c"]
    assert list(loaded.run({"x": x}, ("c", "a"))) == ["c", "a"]
    assert list(loaded.run({"x": x}, ["b"])) == ["b"]


def test_an_output_that_a_file_lists_twice_is_one_output(tmp_path: Path) -> None:
    out = value("y", "FP32", ["n"])
    loaded = load(model([node("Identity", ["x"], ["y"])], [value("x", "FP32", ["n"])], [out, out]), tmp_path)
    assert [spec.name for spec in loaded.signature.outputs] == ["y"]
    assert loaded.run({"x": np.ones(1, np.float32)})["y"].tolist() == [1.0]


def test_an_input_may_be_an_output_as_well(tmp_path: Path) -> None:
    x = value("x", "FP32", ["n"])
    loaded = load(model([node("Neg", ["x"], ["y"])], [x], [value("y", "FP32", ["n"]), x]), tmp_path)
    taken = np.ones(2, np.float32)
    outputs = loaded.run({"x": taken})
    outputs["x"][:] = 5
    assert taken.tolist() == [1.0, 1.0]
    assert outputs["y"].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("datatype", ["FP32", "BF16", "INT64", "BOOL"])
def test_changing_a_returned_constant_changes_no_later_output(tmp_path: Path, datatype: str) -> None:
    first = np.array([1, 0], DTYPES[datatype])
    built = model([], [], [value("y", datatype, [2])], [constant("y", datatype, first)])
    loaded = load(built, tmp_path)
    assert loaded.signature.inputs == ()
    answer = loaded.run({})["y"]
    assert same(answer, first)
    answer[:] = 1
    assert same(loaded.run({})["y"], first)


# Shapes.


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([], ()),
        (None, None),
        (["rows", "columns"], (ANY, ANY)),
        (["rows", 3], (ANY, 3)),
        ([None, 3], (ANY, 3)),
        ([-1, 3], (ANY, 3)),
        ([-7, 3], (ANY, 3)),
        ([2, 3], (2, 3)),
        ([0, 3], (0, 3)),
    ],
)
@pytest.mark.parametrize("datatype", ["FP32", "BF16", "BYTES"])
def test_the_signature_has_dimensions_of_any_size(
    tmp_path: Path, datatype: str, shape: onnx_models.Shape, expected: tuple[int, ...] | None
) -> None:
    signature = load(identity(datatype, shape), tmp_path).signature
    assert signature.inputs == (TensorSpec("x", datatype, expected),)
    assert signature.outputs == (TensorSpec("y", datatype, expected),)


def test_a_scalar_and_a_tensor_of_unknown_rank_differ(tmp_path: Path) -> None:
    """The runtime gives an empty shape for both."""
    kind = tensor_type("FP32", [])
    built = model(
        [
            node("Identity", ["scalar"], ["s"]),
            node("Identity", ["open"], ["o"]),
            node("Identity", ["default"], ["d"]),
            node("OptionalHasElement", ["perhaps"], ["p"]),
        ],
        [
            value("scalar", "FP32", []),
            value("open", "FP32", None),
            value("default", "FP32", []),
            value_of("perhaps", helper.make_optional_type_proto(kind)),
        ],
        [
            value("s", "FP32", []),
            value("o", "FP32", None),
            value("d", "FP32", []),
            value("p", "BOOL", []),
        ],
        [constant("default", "FP32", np.array(2, np.float32))],
    )
    signature = load(built, tmp_path).signature
    shapes = {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}
    assert shapes == dict.fromkeys(("scalar", "default", "perhaps", "s", "d", "p"), ()) | dict.fromkeys(
        "o"
    ) | {"open": None}


# Inputs.


@pytest.mark.parametrize(
    "name",
    ["a.b", "serving_default/x:0", "::", "Eingang größer", "入力😀", "two words", 'quo"ted', "é" * 300],
)
@pytest.mark.parametrize("datatype", ["FP32", "BF16"])
def test_a_name_may_hold_anything(tmp_path: Path, datatype: str, name: str) -> None:
    loaded = load(identity(datatype, ["n"], name, f"{name}/y"), tmp_path)
    tensor = np.ones(2, DTYPES[datatype])
    assert list(loaded.signature.inputs_by_name) == [name]
    assert same(loaded.run({name: tensor})[f"{name}/y"], tensor)


@pytest.mark.parametrize("name", [b"'in", b"'nn"])
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, name: bytes) -> None:
    """Protobuf's writers do not allow it; a damaged file may have it, in a name or in a dimension's."""
    file = onnx_models.save(identity("FP32", ["'nn"], "'in"), tmp_path)
    file.write_bytes(file.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(LoadError, match=r"^a name in model\.onnx is not UTF-8$"):
        OnnxBackend().load(file, LoadOptions())


def test_a_model_may_have_dozens_of_inputs(tmp_path: Path) -> None:
    names = [f"x{number}" for number in range(48)]
    inputs = [value(name, "INT64", ["n"]) for name in names]
    built = model([node("Concat", names, ["y"], axis=0)], inputs, [value("y", "INT64", None)])
    loaded = load(built, tmp_path)
    assert [spec.name for spec in loaded.signature.inputs] == names
    outputs = loaded.run({name: np.array([number]) for number, name in enumerate(names)})
    assert outputs["y"].tolist() == list(range(48))


def test_an_optional_input_may_be_left_out(tmp_path: Path) -> None:
    perhaps = helper.make_optional_type_proto(tensor_type("FP32", ["n"]))
    present = helper.make_graph(
        [node("OptionalGetElement", ["x"], ["a"])], "present", [], [value("a", "FP32", ["n"])]
    )
    absent = helper.make_graph(
        [node("Identity", ["default"], ["b"])], "absent", [], [value("b", "FP32", ["n"])]
    )
    built = model(
        [
            node("OptionalHasElement", ["x"], ["has"]),
            node("If", ["has"], ["y"], then_branch=present, else_branch=absent),
        ],
        [value_of("x", perhaps), value("default", "FP32", ["n"])],
        [value("y", "FP32", ["n"])],
    )
    loaded = load(built, tmp_path)
    assert loaded.signature.inputs_by_name["x"] == TensorSpec("x", "FP32", (ANY,), optional=True)
    assert not loaded.signature.inputs_by_name["default"].optional
    default = np.array([7, 8], np.float32)
    x = np.array([1, 2], np.float32)
    assert loaded.run({"default": default})["y"].tolist() == [7.0, 8.0]
    assert loaded.run({"default": default, "x": x})["y"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("datatype", ["FP32", "BF16", "BYTES"])
def test_an_overridable_initialiser_is_an_optional_input(tmp_path: Path, datatype: str) -> None:
    texts = datatype == "BYTES"
    own, other = ("abc", "xyz") if texts else ((1, 2, 3), (4, 5, 6))
    first, second = (np.array(list(row), DTYPES[datatype]) for row in (own, other))
    built = model(
        [node("Concat", ["x", "w"], ["y"], axis=0), node("Identity", ["w"], ["v"])]
        if datatype != "BF16"
        else [node("Identity", ["x"], ["y"]), node("Identity", ["w"], ["v"])],
        [value("x", datatype, ["n"]), value("w", datatype, [3])],
        [value("y", datatype, None), value("v", datatype, [3])],
        [constant("w", datatype, first)],
    )
    loaded = load(built, tmp_path)
    assert loaded.signature.inputs == (
        TensorSpec("x", datatype, (ANY,)),
        TensorSpec("w", datatype, (3,), optional=True),
    )
    assert loaded.signature.single_input == TensorSpec("x", datatype, (ANY,))
    assert same(loaded.run({"x": second})["v"], first)
    assert same(loaded.run({"x": first, "w": second})["v"], second)
    assert same(loaded.run({"x": second})["v"], first)


def test_initialisers_listed_as_inputs_by_old_models_are_not_inputs(tmp_path: Path) -> None:
    """Before IR version 4 every initialiser was listed as an input, and none could be set."""
    weights = constant("w", "FP32", np.ones(2, np.float32))
    built = model(
        [node("Add", ["x", "w"], ["y"])],
        [value("x", "FP32", ["n", 2]), value("w", "FP32", [2])],
        [value("y", "FP32", ["n", 2])],
        [weights],
        ir_version=3,
        opsets={"": 8, "ai.onnx.ml": 1},
    )
    assert [spec.name for spec in load(built, tmp_path).signature.inputs] == ["x"]


def test_a_default_of_an_unservable_type_keeps_its_value(tmp_path: Path) -> None:
    element = TensorProto.FLOAT8E4M3FN
    built = model(
        [node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), node("Add", ["x", "v"], ["y"])],
        [value("x", "FP32", [1]), helper.make_tensor_value_info("w", element, [1])],
        [value("y", "FP32", [1])],
        [helper.make_tensor("w", element, [1], [2.0])],
    )
    loaded = load(built, tmp_path)
    assert [spec.name for spec in loaded.signature.inputs] == ["x"]
    assert loaded.run({"x": np.ones(1, np.float32)})["y"].tolist() == [3.0]


# BF16, for which numpy has no type.


def test_bf16_beside_other_datatypes(tmp_path: Path) -> None:
    built = model(
        [
            node("Identity", ["bits"], ["same"]),
            node("Cast", ["bits"], ["wide"], to=TensorProto.FLOAT),
            node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        ],
        [value("bits", "BF16", ["n"]), value("x", "FP32", ["n"])],
        [
            value("same", "BF16", ["n"]),
            value("wide", "FP32", ["n"]),
            value("narrow", "BF16", ["n"]),
            value("words", "BYTES", [2]),
        ],
        [constant("words", "BYTES", np.array(["a\0", ""], np.object_))],
    )
    loaded = load(built, tmp_path)
    bits, x = bf16(1.5, -2.0), np.array([0.25, 3.0], np.float32)
    outputs = loaded.run({"bits": bits, "x": x[::-1]})
    assert list(outputs) == ["same", "wide", "narrow", "words"]
    assert same(outputs["same"], bits)
    assert same(outputs["wide"], np.array([1.5, -2.0], np.float32))
    assert same(outputs["narrow"], bf16(3.0, 0.25))
    assert outputs["words"].tolist() == ["a\0", ""]
    assert list(loaded.run({"bits": bits, "x": x}, ("wide",))) == ["wide"]
    assert list(loaded.run({"bits": bits, "x": x}, ("narrow", "wide"))) == ["narrow", "wide"]


def test_bf16_inputs_work_beside_strings(tmp_path: Path) -> None:
    built = model(
        [node("Cast", ["bits"], ["wide"], to=TensorProto.FLOAT), node("Identity", ["words"], ["same"])],
        [value("bits", "BF16", ["n"]), value("words", "BYTES", ["n"])],
        [value("wide", "FP32", ["n"]), value("same", "BYTES", ["n"])],
    )
    outputs = load(built, tmp_path).run({"bits": bf16(0.5), "words": np.array(["naïve"], np.object_)})
    assert outputs["wide"].tolist() == [0.5]
    assert outputs["same"].tolist() == ["naïve"]


def test_bf16_outputs_are_refused_beside_unbindable_tensors(tmp_path: Path) -> None:
    bits = value("bits", "BF16", ["n", 2])
    out = value("same", "BF16", ["n", 2])
    words = model(
        [node("Identity", ["bits"], ["same"]), node("StringNormalizer", ["words"], ["upper"])],
        [bits, value("words", "BYTES", [2])],
        [out, value("upper", "BYTES", [2])],
    )
    with pytest.raises(LoadError, match=r'^BF16 in output "same" .* input "words" \(strings\)$'):
        load(words, tmp_path)
    maps = onnx_models.zip_map(classlabels_int64s=[0, 1])
    maps.graph.node.append(node("Identity", ["bits"], ["same"]))
    maps.graph.input.append(bits)
    maps.graph.output.append(out)
    with pytest.raises(LoadError, match=r'^BF16 in output "same" .* output "scores" \(no tensor\)$'):
        load(maps, tmp_path)


def test_bf16_answers_outlive_the_model(tmp_path: Path) -> None:
    loaded = load(identity("BF16", ["n"]), tmp_path)
    taken = np.arange(50_000, dtype=np.uint16)
    answers = [loaded.run({"x": taken + number})["y"] for number in range(8)]
    loaded.close()
    del loaded
    gc.collect()
    for number, answer in enumerate(answers):
        assert same(answer, taken + number)


@pytest.mark.parametrize("datatype", ["FP32", "BF16"])
def test_several_threads_run_one_model(tmp_path: Path, datatype: str) -> None:
    loaded = load(identity(datatype, ["n"]), tmp_path)
    wrong: list[int] = []

    def work(number: int) -> None:
        taken = np.full(100, number, DTYPES[datatype])
        wrong.extend(number for _ in range(200) if not same(loaded.run({"x": taken})["y"], taken))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What is no tensor.


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({"classlabels_strings": ["no", "yes"]}, [{"no": 0.25, "yes": 0.75}, {"no": 1.0, "yes": 0.0}]),
        ({"classlabels_int64s": [3, -1]}, [{3: 0.25, -1: 0.75}, {3: 1.0, -1: 0.0}]),
    ],
)
def test_maps_are_returned_as_mappings(
    tmp_path: Path, classes: dict[str, Any], expected: list[dict[str | int, float]]
) -> None:
    loaded = load(onnx_models.zip_map(**classes), tmp_path)
    assert loaded.signature.outputs == (TensorSpec("scores", JSON, None),)
    x = np.array([[0.25, 0.75], [1, 0]], np.float32)
    assert loaded.run({"x": x})["scores"] == expected
    assert loaded.run({"x": x[:0]})["scores"] == []


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BYTES", "FP16", "BOOL"])
def test_sequences_are_returned_as_lists_of_arrays(tmp_path: Path, datatype: str) -> None:
    kind = helper.make_sequence_type_proto(tensor_type(datatype))
    built = model(
        [node("SequenceConstruct", ["x", "x"], ["pair"])],
        [value("x", datatype, ["n"])],
        [value_of("pair", kind)],
    )
    loaded = load(built, tmp_path)
    assert loaded.signature.outputs == (TensorSpec("pair", JSON, None),)
    x = np.array(["a", "b"] if datatype == "BYTES" else [1, 0], DTYPES[datatype])
    pair: Any = loaded.run({"x": x})["pair"]
    assert isinstance(pair, list)
    assert all(same(part, x) for part in pair)
    assert len(pair) == 2


def test_an_optional_output_may_be_none(tmp_path: Path) -> None:
    kind = helper.make_optional_type_proto(tensor_type("FP32", ["n"]))
    built = model([node("Identity", ["x"], ["y"])], [value_of("x", kind)], [value_of("y", kind)])
    loaded = load(built, tmp_path)
    assert loaded.signature.outputs == (TensorSpec("y", JSON, None),)
    assert loaded.run({"x": np.ones(2, np.float32)})["y"].tolist() == [1.0, 1.0]
    assert loaded.run({})["y"] is None


# The runtime's own habits.

WATCHED: Final = """
import os, sys
from pathlib import Path
import numpy as np
from inferpool.backends.base import LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend

tasks = len(os.listdir("/proc/self/task"))
model = OnnxBackend().load(Path(sys.argv[1]), LoadOptions(threads=int(sys.argv[2])))
model.run({"x": np.ones(3, np.float32)})
links = []
for number in os.listdir("/proc/self/fd"):
    try:
        links.append(os.readlink(f"/proc/self/fd/{number}"))
    except FileNotFoundError:
        pass  # the listing's own
print(len(os.listdir("/proc/self/task")) - tasks, sum(link.startswith("socket:") for link in links))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads and sockets are counted in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_runtime_starts_its_threads_and_nothing_else(tmp_path: Path, threads: int) -> None:
    """No telemetry: no file, no socket, and no thread but those of a run."""
    home = tmp_path / "home"
    home.mkdir()
    file = onnx_models.save(identity("FP32", ["n"]), tmp_path)
    environ = {
        **{name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"},
        **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR"), str(home)),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", WATCHED, str(file), str(threads)]
    watched = subprocess.run(command, env=environ, cwd=home, capture_output=True, text=True, timeout=60)
    assert (watched.stderr, watched.returncode) == ("", 0)
    assert watched.stdout.split() == [str(threads - 1), "0"]
    assert not list(home.rglob("*"))


def test_memory_that_the_runtime_keeps_for_later_runs_can_be_released(tmp_path: Path) -> None:
    nodes = [node("Expand", ["one", "x"], ["middle"]), node("ReduceMax", ["middle"], ["y"])]
    one = constant("one", "FP32", np.ones(1, np.float32))
    built = model(nodes, [value("x", "INT64", [1])], [value("y", "FP32", [1])], [one])
    loaded = load(built, tmp_path)
    loaded.run({"x": np.array([1])})  # the runtime keeps what the first run took
    before = memory_use().held
    loaded.run({"x": np.array([32 * 2**20])})
    assert memory_use().held - before > 100 * 2**20
    loaded.release_memory()
    assert memory_use().held - before < 50 * 2**20
    assert loaded.run({"x": np.array([2])})["y"] == 1
