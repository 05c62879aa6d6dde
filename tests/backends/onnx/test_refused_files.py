"""Files of ONNX that cannot be served: the error has one line, which names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.backends.base import LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.backends.onnx.load_errors import UNNAMED_ELEMENTS
from inferpool.errors import LoadError
from onnx import TensorProto, helper

from tests import onnx_models
from tests.backends.onnx.saved_models import load
from tests.onnx_models import constant, identity, model, tensor_type, value, value_of

node = helper.make_node


# What cannot be served.

SEQUENCE: Final = helper.make_sequence_type_proto(tensor_type("FP32"))
MAP: Final = helper.make_map_type_proto(TensorProto.STRING, tensor_type("FP32", []))
SPARSE: Final = helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [2, 2])


def takes(kind: Any, taker: Any) -> Any:
    return model(
        [taker], [value_of("odd", kind)], [value("y", "INT64" if kind is SEQUENCE else "FP32", None)]
    )


def cast(element: int) -> Any:
    return model(
        [node("Cast", ["odd"], ["y"], to=TensorProto.FLOAT)],
        [helper.make_tensor_value_info("odd", element, ["n"])],
        [value("y", "FP32", ["n"])],
    )


@pytest.mark.parametrize(
    ("built", "type_name"),
    [
        (takes(SEQUENCE, node("SequenceLength", ["odd"], ["y"])), "seq(tensor(float))"),
        (
            takes(MAP, node("DictVectorizer", ["odd"], ["y"], domain="ai.onnx.ml", string_vocabulary=["a"])),
            "map(string,tensor(float))",
        ),
        (cast(TensorProto.FLOAT8E4M3FN), "tensor(float8e4m3fn)"),
        (cast(TensorProto.FLOAT8E5M2), "tensor(float8e5m2)"),
        (cast(TensorProto.INT4), "tensor(int4)"),
        (cast(TensorProto.UINT4), "tensor(uint4)"),
        (cast(TensorProto.COMPLEX64), "tensor(complex64)"),
        (cast(TensorProto.COMPLEX128), "tensor(complex128)"),
    ],
)
def test_an_input_that_no_request_can_carry_is_refused_by_name(
    tmp_path: Path, built: Any, type_name: str
) -> None:
    with pytest.raises(LoadError) as refused:
        load(built, tmp_path)
    assert refused.value.detail.endswith(f'input "odd" has type {type_name}, which cannot be served')


def test_an_output_that_no_answer_can_carry_is_refused_by_name(tmp_path: Path) -> None:
    built = model(
        [node("Cast", ["x"], ["odd"], to=TensorProto.FLOAT8E5M2)],
        [value("x", "FP32", ["n"])],
        [helper.make_tensor_value_info("odd", TensorProto.FLOAT8E5M2, ["n"])],
    )
    with pytest.raises(
        LoadError, match=r'^output "odd" has type tensor\(float8e5m2\), which cannot be served$'
    ):
        load(built, tmp_path)


def test_a_sparse_tensor_is_refused_by_name(tmp_path: Path) -> None:
    built = model(
        [node("SparseToDenseMatMul", ["odd", "x"], ["y"], domain="com.microsoft")],
        [value_of("odd", SPARSE), value("x", "FP32", [2, 2])],
        [value("y", "FP32", [2, 2])],
        opsets={"com.microsoft": 1},
    )
    with pytest.raises(
        LoadError, match=r'^input "odd" has type sparse_tensor\(float\), which cannot be served$'
    ):
        load(built, tmp_path)


def test_every_onnx_element_type_is_known() -> None:
    """onnx.proto numbers them; the installed version may not have the newest yet."""
    elements = {number: name.lower() for name, number in TensorProto.DataType.items() if number}
    unnamed = elements.keys() - set(onnx_models.ELEMENTS.values())
    assert {number: elements[number] for number in unnamed}.items() <= UNNAMED_ELEMENTS.items()


# Files that do not load.

GOOD: Final = identity("FP32", ["n"]).SerializeToString()


def custom(domain: str, **opsets: int) -> bytes:
    built = model(
        [node("Mystery", ["x"], ["y"], domain=domain)],
        [value("x", "FP32", ["n"])],
        [value("y", "FP32", ["n"])],
        opsets=opsets,
    )
    return built.SerializeToString()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"model\.onnx is empty"),
        (
            b"nothing like a model",
            r"model\.onnx is not an ONNX model, or is incomplete; export it again, or copy the whole file",
        ),
        (
            GOOD[: len(GOOD) // 2],
            r"model\.onnx is not an ONNX model, or is incomplete; export it again, or copy the whole file",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            r"model\.onnx is a Git LFS pointer, not the model: run git lfs pull",
        ),
        (
            model([], [], [value("y", "FP32", [1])], [], ir_version=99).SerializeToString(),
            r"ONNX Runtime cannot load model\.onnx: Unsupported model IR version: 99, max supported .*",
        ),
        (
            model([], [], [], [], opsets={"": 999}).SerializeToString(),
            r"ONNX Runtime cannot load model\.onnx: .*[Oo]pset 999 .*",
        ),
        (
            custom("acme", acme=1),
            r"ONNX Runtime cannot load model\.onnx: .*acme:Mystery.* is not a registered .*",
        ),
        (custom(""), r"ONNX Runtime cannot load model\.onnx: .*No Op registered for Mystery .*"),
        (
            model([], [], [value("z", "FP32", [1])]).SerializeToString(),
            r"ONNX Runtime cannot load model\.onnx: .*Graph output \(z\) does not exist.*",
        ),
        (
            model(
                [node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER", locale="xx_YY.UTF-8")],
                [value("x", "BYTES", ["n"])],
                [value("y", "BYTES", ["n"])],
            ).SerializeToString(),
            r"model\.onnx needs the locale xx_YY\.UTF-8 \(StringNormalizer\), which this machine does not"
            r" have; install it \(Debian, Ubuntu: apt-get install locales && localedef -i xx_YY -f UTF-8"
            r" xx_YY\.UTF-8; Fedora: dnf install glibc-langpack-xx\), or make it in a folder \(localedef -i"
            r" xx_YY -f UTF-8 FOLDER/xx_YY\.UTF-8\) and set LOCPATH=FOLDER for the server",
        ),
    ],
    ids=["empty", "garbage", "half", "lfs", "ir", "opset", "operator", "unknown", "output", "locale"],
)
def test_a_load_error_has_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(LoadError, match=rf"\A{reason}\Z") as refused:
        OnnxBackend().load(file, LoadOptions())
    for noise in ("ONNXRuntimeError", "onnxruntime_src", "::", ".cc:", ".h:", str(tmp_path), "\n"):
        assert noise not in refused.value.detail
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_and_a_folder_are_load_errors(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"^missing\.onnx does not exist$"):
        OnnxBackend().load(tmp_path / "missing.onnx", LoadOptions())
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(LoadError, match=r"^folder\.onnx is a folder, not a file$"):
        OnnxBackend().load(tmp_path / "folder.onnx", LoadOptions())


def test_a_failing_run_raises_and_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = constant("table", "FP32", np.zeros(3, np.float32))
    gather = model(
        [node("Gather", ["table", "x"], ["y"])],
        [value("x", "INT64", ["n"])],
        [value("y", "FP32", ["n"])],
        [table],
    )
    loaded = load(gather, tmp_path)
    with pytest.raises(Exception, match="out of data bounds"):
        loaded.run({"x": np.array([9])})
    assert capfd.readouterr() == ("", "")
    assert loaded.run({"x": np.array([1])})["y"].tolist() == [0.0]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_a_damaged_file_loads_or_is_a_load_error(tmp_path: Path, position: int, byte: int) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])
    detail = "it loads"
    try:
        OnnxBackend().load(file, LoadOptions()).close()
    except LoadError as error:
        detail = error.detail
    assert detail
    assert "\n" not in detail


# External data.

WEIGHTS: Final = np.array([1, 2, 3, 4], np.float32)


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A version's folder; weights lie in it, below it and around it."""
    folder = tmp_path / "repository" / "name" / "1"
    for target in (folder, folder / "data", folder.parent, tmp_path):
        target.mkdir(parents=True, exist_ok=True)
        (target / "weights.bin").write_bytes(WEIGHTS.tobytes())
    (folder / "link.bin").symlink_to("../weights.bin")
    (folder / "linked").symlink_to("..")
    return folder


@pytest.mark.parametrize("location", ["weights.bin", "data/weights.bin", "data/../weights.bin"])
def test_external_data_lies_in_the_folder_of_the_model(version: Path, location: str) -> None:
    loaded = load(onnx_models.add_external(location), version)
    assert loaded.run({"x": np.zeros((1, 4), np.float32)})["y"].tolist() == [WEIGHTS.tolist()]


@pytest.mark.parametrize(
    "location",
    ["../weights.bin", "data/../../weights.bin", "link.bin", "linked/weights.bin", "{}/weights.bin"],
)
def test_external_data_outside_that_folder_is_refused(version: Path, tmp_path: Path, location: str) -> None:
    with pytest.raises(LoadError, match=r"(escapes model directory|Absolute path not allowed)") as refused:
        load(onnx_models.add_external(location.format(tmp_path)), version)
    assert "initializer: w" in refused.value.detail
    assert str(tmp_path) not in refused.value.detail


def test_a_model_may_be_linked_together_with_its_data(version: Path) -> None:
    """As a ConfigMap of Kubernetes is mounted: links to a folder of the day, within the version's."""
    onnx_models.save(onnx_models.add_external("values.bin"), version / "..today")
    (version / "..today" / "values.bin").write_bytes(WEIGHTS.tobytes())
    (version / "..data").symlink_to("..today")
    for name in ("model.onnx", "values.bin"):
        (version / name).symlink_to(f"..data/{name}")
    loaded = OnnxBackend().load(version / "model.onnx", LoadOptions())
    assert loaded.run({"x": np.zeros((1, 4), np.float32)})["y"].tolist() == [WEIGHTS.tolist()]


def test_external_data_that_is_missing_or_too_short_is_named(version: Path) -> None:
    with pytest.raises(LoadError, match=r'does not exist: "nowhere\.bin"$'):
        load(onnx_models.add_external("nowhere.bin"), version)
    with pytest.raises(LoadError, match=r"External initializer: w .* out of bounds"):
        load(onnx_models.add_external("weights.bin", WEIGHTS.size + 1), version)


def test_a_model_is_found_from_a_relative_path(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_models.save(onnx_models.add_external("weights.bin"), version)
    monkeypatch.chdir(version)
    loaded = OnnxBackend().load(Path("model.onnx"), LoadOptions())
    assert loaded.run({"x": np.zeros((1, 4), np.float32)})["y"].tolist() == [WEIGHTS.tolist()]
