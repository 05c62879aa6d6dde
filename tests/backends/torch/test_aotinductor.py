"""AOTInductor packages, where there is a C++ compiler to make them."""

from __future__ import annotations

import asyncio
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inferpool.backends.base import LoadedModel, LoadOptions, TensorHint
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.errors import LoadError
from torch import nn

from tests.backends.torch.networks import configure, described, eager, export, quiet
from tests.backends.torch.test_backend import longest_standstill
from tests.clients import Client, with_clients
from tests.conftest import Serve
from tests.models.record import needs_to_run

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

ONE_ROW = {"aot_inductor.check_lowerbound": False}
INPUTS = (
    TensorHint("x", "FP32", (-1, 256)),
    TensorHint("scale", "FP32", (-1,)),
    TensorHint("mask", "BOOL", (-1, 256)),
)


class Network(nn.Module):
    """Long enough to watch; some of its outputs are None, and stand within one another."""

    def __init__(self, *, exponential: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(256) * 1.5)
        self.exponential = exponential

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        for _ in range(60):
            x = torch.tanh(x @ self.weight)
        y = torch.where(mask, x * scale[:, None], 0)
        more = torch.linalg.matrix_exp(y[:, :2, None] @ y[:, None, :2]) if self.exponential else y > 0
        return {"y": y, "none": None, "more": (more,)}


def compile_package(file: Path, network: nn.Module, **settings: Any) -> Path:
    needs_to_run("aotinductor")
    more = {"scale": torch.rand(4), "mask": torch.rand(4, 256) > 0.5} if isinstance(network, Network) else {}
    program = export(network, torch.rand(4, 256), **more)
    with quiet():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(file), inductor_configs={**ONE_ROW, **settings}
        )
    return file


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(tmp_path_factory.mktemp("compiled") / "model.pt2", Network())


def load(file: Path, *inputs: TensorHint, **options: Any) -> LoadedModel:
    return PyTorchBackend().load(file, LoadOptions(inputs=inputs, trusted=True, **options))


def rows(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {
        "x": rng.standard_normal((count, 256)).astype(np.float32),
        "scale": rng.random(count, np.float32),
        "mask": rng.random((count, 256)) > 0.5,
    }


def check(model: LoadedModel, network: nn.Module) -> None:
    assert [spec.name for spec in model.signature.outputs] == ["y", "more_0"]
    assert model.signature.outputs[0].shape == (-1, 256)
    for count in (1, 2, 3, 7):
        expected = eager(network, rows(count))
        answer = model.run(rows(count))
        np.testing.assert_allclose(answer["y"], expected["y"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(answer["more_0"], expected["more"][0], rtol=1e-3, atol=1e-4)


def test_a_package_gives_what_pytorch_gives(package: Path) -> None:
    model = load(package, *INPUTS)
    assert model.form == "AOTInductor package"
    check(model, Network())
    model.close()


def test_other_threads_work_on_while_it_runs(package: Path) -> None:
    assert longest_standstill(load(package, *INPUTS), rows(2000)) < 0.5


def test_pytorchs_own_runner_lets_no_other_thread_work(package: Path) -> None:
    """Once this fails PyTorch has mended it, and the library need not be called directly any more."""
    with quiet():
        runner = torch._inductor.aoti_load_package(str(package))

    class Own(LoadedModel):
        def run(self, inputs: Any, outputs: Any = None) -> Any:
            feeds = {name: torch.tensor(array) for name, array in inputs.items()}
            return runner.loader.run([feeds["x"], feeds["scale"], feeds["mask"]])

        def close(self) -> None:
            pass

    assert longest_standstill(Own(), rows(2000)) > 0.5


def test_it_is_batched_from_many_clients_and_answers_as_alone(
    package: Path, serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "compiled/1/model.pt2"
    file.parent.mkdir(parents=True)
    shutil.copy(package, file)
    lines = {entry.name: (str(entry.datatype), list(entry.shape or ())) for entry in INPUTS}
    configure(file, described("inputs", **lines))
    server = serve(tmp_path, "--trust")
    version = server.get("/models/compiled/1").json()
    assert version["batching"]["enabled"], version

    async def work(client: Client, number: int) -> None:
        inputs = rows(1 + number % 3)
        content = json.dumps({"inputs": {name: array.tolist() for name, array in inputs.items()}})
        for _ in range(4):
            reply = await client.post("/predict/compiled", content.encode())
            outputs = json.loads(reply.body)["outputs"]
            np.testing.assert_allclose(outputs["y"], eager(Network(), inputs)["y"], rtol=1e-3, atol=1e-4)

    asyncio.run(with_clients(server.port, 12, work))
    assert server.metric("batch_rows_count", model="compiled") < 12 * 4, "some requests shared a run"


def test_positional_arguments_are_named_by_the_description_or_a_sample(package: Path) -> None:
    named = load(package, TensorHint("row", "FP32", (-1, 256)), *INPUTS[1:])
    assert [spec.name for spec in named.signature.inputs] == ["row", "scale", "mask"]
    sample = {name: array.tolist() for name, array in rows(2).items()}
    seen = load(package, samples=({"picture": sample.pop("x"), **sample},))
    assert [(spec.name, spec.datatype, spec.shape) for spec in seen.signature.inputs] == [
        ("picture", "FP32", (-1, 256)),
        ("scale", "FP32", (-1,)),
        ("mask", "BOOL", (-1, 256)),
    ]
    with pytest.raises(LoadError, match='takes 1 positional inputs, but 2 are described: "a", "b"'):
        load(package, TensorHint("a"), TensorHint("b"))
    with pytest.raises(LoadError, match=r'fully describe the input "input_0", "scale", "mask"'):
        load(package)


def test_a_wrong_size_is_an_error_not_a_wrong_answer(package: Path) -> None:
    model = load(package, *INPUTS)
    with pytest.raises(RuntimeError, match="expected: 256"):
        model.run({**rows(2), "x": np.zeros((2, 255), np.float32)})
    check(model, Network())


def test_code_for_another_machine_is_refused(package: Path, tmp_path: Path) -> None:
    for key, value, reason in (
        ("AOTI_DEVICE_KEY", "cuda", "compiled for cuda"),
        ("AOTI_MACHINE", "pdp11", "compiled for pdp11"),
        ("AOTI_CPU_ISA", "AVX2 AVX1024", "a processor with avx1024"),
    ):
        file = tmp_path / "model.pt2"
        with zipfile.ZipFile(package) as old, zipfile.ZipFile(file, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                if entry.filename.endswith("_metadata.json"):
                    data = json.dumps({**json.loads(data), key: value}).encode()
                new.writestr(entry.filename, data)
        with pytest.raises(LoadError, match=reason):
            load(file, *INPUTS)


def test_a_package_without_its_weights_is_refused(tmp_path: Path) -> None:
    settings = {"aot_inductor.package_constants_in_so": False}
    file = compile_package(tmp_path / "model.pt2", nn.Linear(256, 2), **settings)
    with pytest.raises(LoadError, match="compiled without its weights"):
        load(file, *INPUTS)


def test_code_that_refuses_a_single_row_is_refused(tmp_path: Path) -> None:
    settings = {"aot_inductor.check_lowerbound": True}
    file = compile_package(tmp_path / "model.pt2", nn.Linear(256, 2), **settings)
    with pytest.raises(LoadError, match=r"compile it again with .*check_lowerbound"):
        load(file, INPUTS[0])


def test_a_package_that_needs_pytorch_uses_pytorchs_runner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(exponential=True)
    model = load(compile_package(tmp_path / "model.pt2", network), *INPUTS)
    assert model.form == "AOTInductor package, holding the interpreter lock"
    assert "the server does nothing else" in caplog.text
    check(model, network)
