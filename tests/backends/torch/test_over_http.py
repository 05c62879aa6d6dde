"""PyTorch's models through the real server: alone, batched from many clients, beside ONNX, and refused.

In one process, and in an engine of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

from tests.backends.torch import networks
from tests.backends.torch.networks import (
    ROOT,
    configure,
    described,
    eager,
    save_exported,
    save_scripted,
    save_traced,
)
from tests.clients import Client, with_clients
from tests.conftest import WITHOUT_SPARE, Serve, in_both_engines
from tests.explain.models import seven
from tests.record import needs_to_run
from tests.server import Server, wait_until

pytestmark = in_both_engines

IMAGES: Final = ("FP32", [-1, 1, 8, 8])
Inputs = dict[str, np.ndarray]


def images(rows: int, seed: int = 0) -> Inputs:
    return {"input": np.random.default_rng(seed).random((rows, 1, 8, 8), np.float32)}


def mixed(rows: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    return {"x": rng.random((rows, 4), np.float32), "scale": rng.random(rows, np.float32)}


def numbers(rows: int, seed: int = 0) -> Inputs:
    return {"n": np.random.default_rng(seed).integers(1, 1000, (rows, 1))}


def halves(rows: int, seed: int = 0) -> Inputs:
    return {"input": np.random.default_rng(seed).random((rows, 4)).astype(np.float16)}


MODULES: Final[dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs], float]]] = {
    "digits_scripted": (networks.digits, images, 1e-4),
    "digits_traced": (networks.digits, images, 1e-4),
    "digits_exported": (networks.digits, images, 1e-4),
    "mixed_scripted": (networks.Mixed, mixed, 1e-4),
    "mixed_exported": (networks.Mixed, mixed, 1e-4),
    "collatz": (networks.Collatz, numbers, 0),
    "half": (lambda: nn.Linear(4, 3).half(), halves, 1e-2),
}
"""Each served module, what it takes, and the tolerance of its answers."""


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: make().eval() for name, (make, _, _) in MODULES.items()}


@pytest.fixture(scope="module")
def server(
    modules: dict[str, nn.Module],
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    engine_variables: Mapping[str, str],
) -> Iterator[Server]:
    needs_to_run("torch")
    repository = tmp_path_factory.mktemp("torch")

    def at(name: str, suffix: str = "pt2") -> Path:
        return repository / name / "1" / f"model.{suffix}"

    onnx = at("digits_onnx", "onnx")
    onnx.parent.mkdir(parents=True)
    shutil.copy(ROOT / "models/digits/1/model.onnx", onnx)
    configure(save_scripted(at("digits_scripted", "pt"), modules["digits_scripted"]), described(input=IMAGES))
    traced = save_traced(at("digits_traced", "pt"), modules["digits_traced"], torch.rand(2, 1, 8, 8))
    configure(traced, described(input=IMAGES))
    save_exported(at("digits_exported"), modules["digits_exported"], torch.rand(2, 1, 8, 8))
    configure(
        save_scripted(at("mixed_scripted", "pt"), modules["mixed_scripted"]),
        described(x=("FP32", [-1, 4]), scale=("FP32", [-1])),
    )
    save_exported(at("mixed_exported"), modules["mixed_exported"], torch.rand(2, 4), scale=torch.rand(2))
    collatz = save_scripted(at("collatz", "pt"), modules["collatz"])
    golden = collatz.parents[1] / "samples/27.json"
    golden.parent.mkdir()
    golden.write_text(json.dumps({"inputs": {"n": [[27], [1]]}, "outputs": {"output_0": [[111], [0]]}}))
    save_exported(at("half"), modules["half"], torch.rand(2, 4).half())

    # Measured on a busy machine, one row at a time may seem as quick as several.
    for name in MODULES:
        settings = repository / name / "model.toml"
        described_as = settings.read_text() if settings.exists() else ""
        settings.write_text(f"{described_as}[batching]\nmax_rows = 16\n")

    # What the proof has to catch.
    save_exported(at("dropout"), networks.Dropout(), torch.rand(2, 4))
    dropping = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    configure(
        save_traced(at("dropout_traced", "pt"), dropping, torch.rand(2, 4)),
        described(input=("FP32", [-1, 4])),
    )
    norm = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    save_exported(at("batch_norm"), norm, torch.rand(2, 1, 4, 4))
    configure(
        save_traced(at("batch_norm_traced", "pt"), norm, torch.rand(2, 1, 4, 4)),
        described(input=("FP32", [-1, 1, 4, 4])),
    )
    save_exported(at("centred"), networks.Centred(), torch.rand(2, 4))
    limited = torch.export.Dim("limited", max=12)
    save_exported(at("limited"), nn.Linear(4, 2), torch.rand(2, 4), shapes=({0: limited},))

    # What cannot be served.
    save_scripted(at("unknown", "pt"), networks.digits())
    configure(save_scripted(at("mismatched", "pt"), nn.Linear(4, 2)), described(input=("FP32", [-1, 5])))
    save_exported(at("contradicted"), nn.Linear(4, 2), torch.rand(2, 4))
    configure(at("contradicted"), described(input=("FP32", [-1, 5])))
    save_exported(at("misspelt"), nn.Linear(4, 2), torch.rand(2, 4))
    configure(at("misspelt"), '[[inputs]]\nname = "input"\ndatatyp = "FP32"\n')

    served = Server(
        repository,
        ("--trust",),
        {
            "INFERPOOL_CACHE_DIR": str(cache_dir),
            "INFERPOOL_MEASURE_MS": "300",
            **WITHOUT_SPARE,
            **engine_variables,
        },
    )
    served.wait_loaded()
    yield served
    served.kill()


def view(server: Server, name: str) -> Any:
    return server.get(f"/models/{name}/1").json()


def body(inputs: Inputs) -> bytes:
    return json.dumps({"inputs": {name: array.tolist() for name, array in inputs.items()}}).encode()


def expected(module: nn.Module, inputs: Inputs) -> dict[str, np.ndarray]:
    given = eager(module, inputs)
    named = given if isinstance(given, dict) else {"output_0": given}
    return {name: tensor.numpy() for name, tensor in named.items()}


def check(answer: bytes, module: nn.Module, inputs: Inputs, tolerance: float) -> None:
    outputs = json.loads(answer)["outputs"]
    for name, want in expected(module, inputs).items():
        np.testing.assert_allclose(outputs[name], want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_a_model_answers_as_pytorch_does(server: Server, modules: dict[str, nn.Module], name: str) -> None:
    _, make, tolerance = MODULES[name]
    for rows in (1, 3):
        inputs = make(rows)
        reply = server.post(f"/predict/{name}", content=body(inputs))
        assert reply.status_code == 200, reply.text
        check(reply.content, modules[name], inputs, tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_rows_of_many_clients_share_runs_and_answer_as_alone(
    server: Server, modules: dict[str, nn.Module], name: str
) -> None:
    _, make, tolerance = MODULES[name]
    assert view(server, name)["batching"]["enabled"], view(server, name)["batching"]

    async def work(client: Client, number: int) -> None:
        for turn in range(8):
            inputs = make(1 + (number + turn) % 3, seed=100 * number + turn)
            reply = await client.post(f"/predict/{name}", body(inputs))
            assert reply.status == 200, reply
            check(reply.body, modules[name], inputs, tolerance)

    batches, rows = (server.metric(f"batch_rows_{part}", model=name) for part in ("count", "sum"))
    asyncio.run(with_clients(server.port, 24, work))
    batches = server.metric("batch_rows_count", model=name) - batches
    rows = server.metric("batch_rows_sum", model=name) - rows
    assert rows == sum(1 + (number + turn) % 3 for number in range(24) for turn in range(8))
    assert batches < 24 * 8, "some requests shared a run"


def test_the_same_network_answers_the_same_in_every_format(server: Server) -> None:
    pictures = images(5)["input"].tolist()
    answers = {}
    for name in ("digits_onnx", "digits_scripted", "digits_traced", "digits_exported"):
        reply = server.post(f"/predict/{name}", json={"inputs": pictures})
        (answers[name],) = reply.json()["outputs"].values()
    for name, answer in answers.items():
        np.testing.assert_allclose(answer, answers["digits_onnx"], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["digits_scripted", "digits_traced", "digits_exported"])
def test_pixels_contribute_what_captum_says(server: Server, name: str) -> None:
    path = f"/explain/{name}?method=integrated-gradients&baseline=zeros&target=7"
    answer = server.post(path, json={"inputs": [seven().tolist()]})
    [found] = answer.json()["explanations"]
    amounts = [part["contribution"] for part in found["contributions"]]
    captum = json.loads((ROOT / "tests/explain/captum_values.json").read_text())
    np.testing.assert_allclose(amounts, captum["digits"], atol=1e-5)
    assert found["additivity"]["holds"]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("collatz", [[27]], "is INT64"),
        ("digits_onnx", seven()[None].tolist(), "onnxruntime runs this one"),
    ],
)
def test_gradients_are_refused_if_there_are_none(server: Server, name: str, row: Any, said: str) -> None:
    answer = server.post(f"/explain/{name}?method=integrated-gradients", json={"inputs": row})
    text = answer.json()["detail"]
    assert (answer.status_code, said in text) == (422, True), text
    assert "kernel, permutation or occlusion" in text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dropout", "differs"),
        ("dropout_traced", "differs"),
        ("batch_norm", "changes the state of the model"),
        ("batch_norm_traced", "changes the state of the model"),
        ("centred", "mean takes one value over the rows"),
    ],
)
def test_a_model_that_mixes_rows_or_draws_random_numbers_is_not_batched(
    server: Server, name: str, why: str
) -> None:
    version = view(server, name)
    assert version["state"] == "ready", version["reason"]
    assert version["batching"]["enabled"] is False
    assert why in version["batching"]["reason"]


def test_a_model_that_mixes_rows_answers_each_request_as_alone(server: Server) -> None:
    async def work(client: Client, number: int) -> None:
        rows = np.random.default_rng(number).random((3, 4))
        reply = await client.post("/predict/centred", json.dumps({"inputs": rows.tolist()}).encode())
        np.testing.assert_allclose(
            json.loads(reply.body)["outputs"]["output_0"], rows - rows.mean(0), rtol=1e-4, atol=1e-6
        )

    asyncio.run(with_clients(server.port, 8, work))


def test_no_batch_is_larger_than_a_program_was_exported_for(server: Server) -> None:
    assert view(server, "limited")["batching"]["max_rows"] <= 12
    reply = server.post("/predict/limited", json={"inputs": [[1, 2, 3, 4]] * 50})
    assert len(reply.json()["outputs"]["output_0"]) == 50


def test_the_kind_of_model_is_shown(server: Server) -> None:
    version = torch.__version__
    assert (
        view(server, "digits_scripted")["backend"] == f"torch {version} TorchScript (deprecated by PyTorch)"
    )
    assert view(server, "digits_exported")["backend"] == f"torch {version} exported program"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unknown", '[[inputs]]\nname = "input"\ndatatype = "FP32"\nshape = [-1, 64]'),
        # The first line of TorchScript's error says only that an operation failed.
        ("mismatched", "(RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (
            "contradicted",
            "contradicted/model.toml: inputs: input has shape [-1, 4] in the model, not [-1, 5]",
        ),
        ("misspelt", 'misspelt/model.toml: inputs.0.datatyp: unknown key; did you mean "datatype"?'),
    ],
)
def test_a_refusal_says_what_to_write(server: Server, name: str, reason: str) -> None:
    version = view(server, name)
    assert version["state"] == "failed"
    assert reason in version["reason"]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_files_are_served_when_they_are_trusted_by_their_digests(serve: Serve, tmp_path: Path) -> None:
    """Pasting the line of a refusal is enough, with several versions too: the key may be there only once."""
    listed, unlisted = (
        save_exported(tmp_path / name / "1/model.pt2", nn.Linear(4, 2), torch.rand(2, 4))
        for name in ("listed", "unlisted")
    )
    configure(listed, f'sha256 = ["{sha256(listed).upper()}"]')
    takes_four = described(input=("FP32", [-1, 4]))
    linear = nn.Linear(4, 2)
    first, second = (
        save_scripted(tmp_path / "m" / version / "model.pt", module)
        for version, module in (("1", nn.Linear(4, 2)), ("2", linear))
    )
    configure(first, takes_four)
    server = serve(tmp_path, "--watch")  # one server, because PyTorch takes seconds to import
    assert view(server, "listed")["state"] == "ready"
    refused = view(server, "unlisted")
    assert refused["state"] == "failed"
    assert f'write sha256 = ["{sha256(unlisted)}"] at the top of model.toml' in refused["reason"]
    line = f'sha256 = ["{sha256(first)}", "{sha256(second)}"]'
    for version in ("1", "2"):
        reason = server.get(f"/models/m/{version}").json()["reason"]
        assert f"write {line} at the top of model.toml (it trusts 1/model.pt, 2/model.pt)" in reason
    # What the refusal said to write; and only one of the two versions.
    configure(unlisted, f'sha256 = ["{sha256(unlisted)}"]')
    configure(first, f'sha256 = ["{sha256(first)}"]\n{takes_four}')
    states = {"unlisted/1": "ready", "m/1": "ready", "m/2": "failed"}
    wait_until(lambda: states_of(server, *states) == states, "what is listed is served")
    assert f"replace the line sha256 by {line}" in server.get("/models/m/2").json()["reason"]
    configure(first, f"{line}\n{takes_four}")
    states = {"m/1": "ready", "m/2": "ready"}
    wait_until(lambda: states_of(server, *states) == states, "both versions are served")
    answer = server.post("/predict/m", json={"inputs": [[0.0] * 4, [1.0] * 4]})
    bias, _ = answer.json()["outputs"]["output_0"]
    np.testing.assert_allclose(bias, linear.bias.detach(), rtol=1e-6)


def states_of(server: Server, *versions: str) -> dict[str, str]:
    """The states of versions, each named as `model/version`."""
    return {version: server.get(f"/models/{version}").json()["state"] for version in versions}


def test_a_server_without_pytorch_serves_the_rest(serve: Serve, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    blind.mkdir()
    (blind / "sitecustomize.py").write_text(
        "import importlib.metadata, sys\n"
        "sys.modules['torch'] = None\n"
        "real = importlib.metadata.version\n"
        "def version(name):\n"
        "    if name == 'torch':\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "importlib.metadata.version = version\n"
    )
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "models/diabetes", repository / "diabetes")
    save_exported(repository / "linear/1/model.pt2", nn.Linear(4, 2), torch.rand(2, 4))
    server = serve(repository, PYTHONPATH=f"{blind}:{ROOT}")
    assert view(server, "diabetes")["state"] == "ready"
    assert "pip install 'inferpool[torch]'" in view(server, "linear")["reason"]
    assert 'torch="not installed"' in server.get("/metrics").text


def test_pytorch_is_not_imported_unless_a_model_needs_it(serve: Serve, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "diabetes")
    server = serve(tmp_path)
    assert server.post("/predict/diabetes", json={"inputs": [[0.0] * 10]}).status_code == 200
    for pid in server.processes():
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
