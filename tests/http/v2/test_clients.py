"""Published clients of the Open Inference Protocol against a real server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from tests.conftest import ROOT
from tests.onnx_models import ELEMENTS, write_identity
from tests.server import Server

with warnings.catch_warnings(action="ignore"):
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException, triton_to_np_dtype

TEXTS = ["", "a", "\0", "a\0b\0", "é ß 漢字 🜁", '\x7f\n"\\', "x" * 300, "\ud7ff\ue000\U0010ffff"]
SHAPES = [(3, 8), (1, 1), (2, 0), (0, 3)]
ODD_FLOATS = [np.nan, np.inf, -np.inf, -0.0, 1e-45, 5e-324]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An identity model for each datatype, a scalar one, and one of all datatypes."""
    folder = tmp_path_factory.mktemp("identities")
    for datatype in ELEMENTS:
        write_identity(folder, datatype, [datatype])
    write_identity(folder, "scalar", ["FP32"], ())
    # ONNX Runtime cannot take strings and return BF16 in one run.
    write_identity(folder, "all", [datatype for datatype in ELEMENTS if datatype != "BF16"])
    return folder


@pytest.fixture(scope="module")
def identities(cache_dir: Path, repository: Path) -> Iterator[Server]:
    server = Server(repository, (), {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "20"})
    server.wait_loaded()
    yield server
    server.kill()


@pytest.fixture
def client(bundled: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{bundled.port}") as client:
        yield client


def values(datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values of the datatype, unusual ones included."""
    chance = np.random.default_rng(4)
    count = int(np.prod(shape))
    dtype = np.dtype(triton_to_np_dtype(datatype))
    if datatype == "BYTES":
        return np.array([TEXTS[n % len(TEXTS)].encode() for n in range(count)], dtype).reshape(shape)
    if datatype == "BOOL":
        return chance.random(shape) < 0.5
    tensor = np.frombuffer(chance.bytes(count * dtype.itemsize), dtype).reshape(shape).copy()
    if datatype in ("FP16", "BF16", "FP32", "FP64"):
        with np.errstate(all="ignore"):
            odd = np.array(ODD_FLOATS).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        odd = np.array([limits.min, limits.max], dtype)
    tensor.reshape(-1)[: len(odd)] = odd[: tensor.size]
    return tensor


def run(file: Path, tensor: np.ndarray) -> np.ndarray:
    """The outputs of ONNX Runtime, in the form that the protocol's clients return."""
    if tensor.dtype == ml_dtypes.bfloat16:
        return tensor  # its Python API has no arrays of BF16, and the model is an identity
    session = onnxruntime.InferenceSession(file)
    name = session.get_inputs()[0].name
    if tensor.dtype == np.object_:
        texts = np.array([text.decode() for text in tensor.flat], np.object_).reshape(tensor.shape)
        (answer,) = session.run(None, {name: texts})
        return np.array([text.encode() for text in answer.flat], np.object_).reshape(answer.shape)
    (answer,) = session.run(None, {name: tensor})
    return answer


def bits(tensor: np.ndarray) -> object:
    elements = tensor.tolist() if tensor.dtype == np.object_ else tensor.tobytes()
    return tensor.dtype, tensor.shape, elements


def as_input(name: str, datatype: str, tensor: np.ndarray, make: Any = triton, **options: Any) -> Any:
    given = make.InferInput(name, list(tensor.shape), datatype)
    return given.set_data_from_numpy(tensor, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("datatype", ELEMENTS)
def test_every_datatype_answers_bit_for_bit_as_the_runtime_does(
    identities: Server, repository: Path, datatype: str, shape: tuple[int, ...]
) -> None:
    tensor = values(datatype, shape)
    with triton.InferenceServerClient(f"127.0.0.1:{identities.port}") as client:
        answer = client.infer(datatype, [as_input("x0", datatype, tensor)])
    assert answer.get_output("y0")["datatype"] == datatype
    expected = run(repository / datatype / "1" / "model.onnx", tensor)
    assert bits(answer.as_numpy("y0").reshape(shape)) == bits(expected)


@pytest.mark.parametrize("binary", [True, False])
def test_many_datatypes_travel_in_one_request_and_some_as_json(identities: Server, binary: bool) -> None:
    chosen = [datatype for datatype in ELEMENTS if datatype != "BF16"]
    tensors = {}
    inputs, outputs = [], []
    for index, datatype in enumerate(chosen):
        tensor = values(datatype, (2, 4))
        if datatype.startswith("FP"):
            tensor = np.arange(8, dtype=tensor.dtype).reshape(2, 4) / 8
        tensors[f"y{index}"] = tensor
        # Triton's client cannot send FP16 as JSON.
        in_json = index % 2 == 0 and datatype != "FP16"
        inputs.append(as_input(f"x{index}", datatype, tensor, binary_data=not in_json))
        outputs.append(triton.InferRequestedOutput(f"y{index}", binary_data=binary))
    with triton.InferenceServerClient(f"127.0.0.1:{identities.port}") as client:
        answer = client.infer("all", inputs, outputs=outputs)
    for name, tensor in tensors.items():
        given = answer.as_numpy(name)
        if not binary and tensor.dtype == np.object_:
            given = np.array([text.encode() for text in given.flat], np.object_).reshape(given.shape)
        assert given.tolist() == tensor.tolist(), name


def test_a_scalar_has_an_empty_shape(identities: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{identities.port}") as client:
        answer = client.infer("scalar", [as_input("x0", "FP32", np.array(2.5, np.float32))])
    assert answer.get_output("y0")["shape"] == []
    assert answer.as_numpy("y0").item() == 2.5


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize(
    ("model", "name", "shape"), [("digits", "image", (5, 1, 8, 8)), ("diabetes", "features", (5, 10))]
)
def test_the_bundled_models_answer_as_the_runtime_does(
    client: Any, model: str, name: str, shape: tuple[int, ...], compression: str | None
) -> None:
    rows = np.random.default_rng(0).random(shape, np.float32)
    answer = client.infer(
        model,
        [as_input(name, "FP32", rows)],
        model_version="1",
        request_id="mine",
        priority=1,
        timeout=10_000_000,
        parameters={"own": "value"},
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    response = answer.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == (model, "1", "mine")
    expected = run(ROOT / "models" / model / "1" / "model.onnx", rows)
    assert bits(answer.as_numpy(response["outputs"][0]["name"])) == bits(expected)


def test_a_classification_names_the_best_labels(client: Any) -> None:
    sample = json.loads((ROOT / "models/digits/samples/held_out.json").read_text())
    rows = np.array(sample["inputs"]["image"], np.float32)
    output = triton.InferRequestedOutput("logits", class_count=3)
    classes = client.infer("digits", [as_input("image", "FP32", rows)], outputs=[output]).as_numpy("logits")
    logits = np.array(sample["outputs"]["logits"])
    assert classes.shape == (len(rows), 3)
    for row, best in zip(logits, classes, strict=True):
        order = np.argsort(-row)[:3]
        assert [entry.decode().split(":")[1:] for entry in best] == [[str(n), str(n)] for n in order]


def test_the_client_reads_health_metadata_configuration_and_the_index(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("digits", "7")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("digits")
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert metadata["platform"] == "onnxruntime_onnx"
    config = client.get_model_config("digits", "1")
    assert config["max_batch_size"] > 1
    assert config["input"][0]["dims"] == [1, 8, 8]
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    index = client.get_model_repository_index()
    assert {(entry["name"], entry["state"]) for entry in index} == {
        ("digits", "READY"),
        ("diabetes", "READY"),
        ("forecast", "READY"),
        ("next-word", "READY"),
    }


def test_the_statistics_count_what_the_client_did(client: Any) -> None:
    def stats() -> dict[str, Any]:
        return client.get_inference_statistics("diabetes", "1")["model_stats"][0]

    before = stats()
    rows = np.ones((3, 10), np.float32)
    for _ in range(4):
        client.infer("diabetes", [as_input("features", "FP32", rows)])
    with pytest.raises(InferenceServerException, match="features"):
        client.infer("diabetes", [as_input("features", "FP32", rows[:, 1:])])
    after = stats()
    assert after["inference_count"] - before["inference_count"] == 12
    assert after["execution_count"] - before["execution_count"] == 4
    assert after["last_inference"] > before["last_inference"]
    for kind, count in (
        ("success", 4),
        ("fail", 1),
        ("queue", 4),
        ("compute_input", 4),
        ("compute_infer", 4),
    ):
        assert after["inference_stats"][kind]["count"] - before["inference_stats"][kind]["count"] == count
        assert after["inference_stats"][kind]["ns"] > before["inference_stats"][kind]["ns"]
    runs = [{size["batch_size"]: size for size in one["batch_stats"]} for one in (before, after)]
    none = {"compute_infer": {"count": 0, "ns": 0}}
    assert runs[1][3]["compute_infer"]["count"] - runs[0].get(3, none)["compute_infer"]["count"] == 4
    assert runs[1][3]["compute_infer"]["ns"] > 0


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda client: client.load_model("digits"), "403"),
        (lambda client: client.unload_model("digits"), "403"),
        (lambda client: client.get_log_settings(), "404"),
        (lambda client: client.update_log_settings({}), "404"),
        (lambda client: client.get_trace_settings("digits"), "404"),
        (lambda client: client.get_system_shared_memory_status(), "404"),
        (lambda client: client.register_system_shared_memory("a", "b", 1), "404"),
        (lambda client: client.get_cuda_shared_memory_status(), "404"),
        (lambda client: client.get_model_metadata("nobody"), "404"),
        (lambda client: client.get_inference_statistics("nobody"), "404"),
    ],
)
def test_the_client_gets_the_text_of_an_error(
    client: Any, call: Callable[[Any], object], status: str
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        call(client)
    assert refused.value.status() == status
    assert len(refused.value.message().split()) > 3


def test_the_asyncio_client_infers_side_by_side(bundled: Server) -> None:
    rows = np.random.default_rng(1).random((40, 1, 8, 8), np.float32)
    expected = run(ROOT / "models/digits/1/model.onnx", rows)
    with warnings.catch_warnings(action="ignore"):
        import tritonclient.http.aio as triton_aio

    async def ask() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{bundled.port}") as client:
            assert await client.is_model_ready("digits")
            answers = await asyncio.gather(
                *(client.infer("digits", [as_input("image", "FP32", row[None], triton_aio)]) for row in rows)
            )
            return [answer.as_numpy("logits") for answer in answers]

    np.testing.assert_allclose(np.concatenate(asyncio.run(ask())), expected, atol=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_kserves_client_infers_and_asks_for_health(bundled: Server, binary: bool) -> None:
    with warnings.catch_warnings(action="ignore"):
        kserve = pytest.importorskip("kserve", reason="kserve does not run on this Python")
        from kserve.inference_client import InferenceRESTClient, RESTConfig
        from kserve.protocol.infer_type import RequestedOutput

    rows = np.random.default_rng(2).random((2, 10), np.float32)

    async def ask() -> Any:
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            assert await client.is_server_live(bundled.url)
            assert await client.is_server_ready(bundled.url)
            assert await client.is_model_ready(bundled.url, "diabetes")
            assert not await client.is_model_ready(bundled.url, "nobody")
            given = kserve.InferInput("features", [2, 10], "FP32")
            given.set_data_from_numpy(rows, binary_data=binary)
            wanted = RequestedOutput("progression", {"binary_data": binary})
            request = kserve.InferRequest("diabetes", [given], request_id="mine", request_outputs=[wanted])
            return await client.infer(bundled.url, request, model_name="diabetes")

    answer = asyncio.run(ask())
    assert answer.id == "mine"
    found = answer.outputs[0].as_numpy()
    np.testing.assert_allclose(found, run(ROOT / "models/diabetes/1/model.onnx", rows), rtol=1e-6)


def test_perf_analyzer_drives_the_server(bundled: Server, tmp_path: Path) -> None:
    # The binary itself, because the exit status of the wrapper command is not the binary's.
    spec = importlib.util.find_spec("perf_analyzer")
    binary = Path(spec.origin or "").parent / "bin" / "perf_analyzer" if spec is not None else None
    if binary is None or not binary.exists():
        pytest.skip("perf_analyzer is not here: the wheels that hold its binary are for glibc from 2.38")
    started = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=30)
    if started.returncode:
        pytest.skip(f"perf_analyzer does not start here: {(started.stderr or started.stdout).strip()[:300]}")
    report = tmp_path / "report.csv"
    command = [str(binary), "-m", "diabetes", "-u", f"127.0.0.1:{bundled.port}", "-i", "http", "-b", "1"]
    command += ["--concurrency-range", "2", "--request-count", "200", "-f", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    names, numbers = (line.split(",") for line in report.read_text().splitlines()[:2])
    assert float(dict(zip(names, numbers, strict=True))["Inferences/Second"]) > 0
