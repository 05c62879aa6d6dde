"""TorchScript and exported programs: what they take and give, compared with PyTorch itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inferpool.backends.base import LoadedModel, LoadOptions, TensorHint
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.backends.torch.model import to_array, to_tensor
from inferpool.backends.torch.program import views_to_reshapes
from inferpool.errors import LoadError
from inferpool.tensors import DTYPES
from torch import nn

from tests.backends.torch import networks
from tests.backends.torch.networks import save_exported, save_scripted, save_traced

SCRIPT = "TorchScript (deprecated by PyTorch)"
PROGRAM = "exported program"


def load(file: Path, *inputs: TensorHint, threads: int = 1, **options: Any) -> LoadedModel:
    return PyTorchBackend().load(file, LoadOptions(threads=threads, inputs=inputs, trusted=True, **options))


def x(*shape: int, datatype: str = "FP32") -> TensorHint:
    return TensorHint("x", datatype, shape)


class Function(nn.Module):
    """A module that is one function of x."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def exported(tmp_path: Path, function: Callable[[Any], Any], sample: torch.Tensor) -> LoadedModel:
    return load(save_exported(tmp_path / "model.pt2", Function(function), sample))


# What a model takes and gives.


@pytest.mark.parametrize("kind", ["scripted", "traced", "exported"])
def test_every_kind_gives_what_pytorch_gives(tmp_path: Path, kind: str) -> None:
    network = networks.digits()
    sample = torch.rand(2, 1, 8, 8)
    if kind == "exported":
        model = load(save_exported(tmp_path / "model.pt2", network, sample))
        name = "input"
    else:
        file = tmp_path / "model.pt"
        save = save_scripted if kind == "scripted" else save_traced
        save(file, network, *[sample] * (kind == "traced"))
        model = load(file, TensorHint("input", "FP32", (-1, 1, 8, 8)))
        name = "input"
    assert model.form == (PROGRAM if kind == "exported" else SCRIPT)
    (taken,), (given_,) = model.signature.inputs, model.signature.outputs
    assert (taken.name, taken.datatype, taken.shape) == (name, "FP32", (-1, 1, 8, 8))
    assert (given_.name, given_.datatype, given_.shape) == ("output_0", "FP32", (-1, 10))
    for rows in (1, 2, 3, 5, 16):
        images = np.random.default_rng(rows).random((rows, 1, 8, 8), np.float32)
        answer = model.run({name: images})["output_0"]
        np.testing.assert_allclose(answer, eager(network, images), rtol=1e-4, atol=1e-5)


def eager(network: nn.Module, *inputs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(*map(torch.tensor, inputs)).numpy()


@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_positional_and_keyword_inputs_and_a_dict_of_outputs(tmp_path: Path, kind: str) -> None:
    network = networks.Mixed().eval()
    if kind == "exported":
        model = load(save_exported(tmp_path / "m.pt2", network, torch.rand(2, 4), scale=torch.rand(2)))
    else:
        model = load(save_scripted(tmp_path / "m.pt", network), x(-1, 4), TensorHint("scale", "FP32", (-1,)))
    assert [spec.name for spec in model.signature.inputs] == ["x", "scale"]
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.signature.outputs] == [
        ("scores", "FP32", (-1, 3)),
        ("best", "INT64", (-1,)),
    ]
    feeds = {"x": np.ones((3, 4), np.float32), "scale": np.arange(3, dtype=np.float32)}
    expected = networks.eager(network, feeds)
    answer = model.run(feeds)
    np.testing.assert_allclose(answer["scores"], expected["scores"], rtol=1e-5)
    np.testing.assert_array_equal(answer["best"], expected["best"])
    assert list(model.run(feeds, ["best"])) == ["best"], "only what was asked for"


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x + 1, x * 2)


class Listed(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x + 1, x * 2]


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return x + 1, (x * 2, x * 3)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Listed(), ["output_0", "output_1"]),
        (Nested(), ["output_0", "output_1_0", "output_1_1"]),
        (Named(), ["first", "second"]),
    ],
)
def test_outputs_are_named_by_their_path(tmp_path: Path, module: nn.Module, names: list[str]) -> None:
    file = save_scripted(tmp_path / "m.pt", module)
    model = load(file, x(-1, 4))
    assert [spec.name for spec in model.signature.outputs] == names
    rows = np.ones((2, 4), np.float32)
    assert [float(out.flat[0]) for out in model.run({"x": rows}).values()] == [2.0, 2.0, 3.0][: len(names)]


def test_outputs_without_names_are_named_as_described(tmp_path: Path) -> None:
    file = save_scripted(tmp_path / "m.pt", Listed())
    model = load(file, x(-1, 4), outputs=(TensorHint("more"), TensorHint("twice", None, (-1, -1))))
    assert [(spec.name, spec.shape) for spec in model.signature.outputs] == [
        ("more", (-1, 4)),
        ("twice", (-1, -1)),
    ]
    with pytest.raises(LoadError, match=r'returns "output_0", "output_1"; model.toml describes "only"'):
        load(file, x(-1, 4), outputs=(TensorHint("only"),))


def test_constants_and_containers_among_the_arguments_of_a_program(tmp_path: Path) -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor, times: int, more: Mapping[str, Any]) -> Any:
            return {"y": x * times + more["a"], "none": None, "parts": [more["b"][0]]}

    sample = (torch.rand(2, 3), 4, {"a": torch.rand(2, 3), "b": [torch.ones(2, dtype=torch.bool)]})
    rows = {0: networks.ROWS}
    shapes = (rows, None, {"a": rows, "b": [rows]})
    model = load(save_exported(tmp_path / "m.pt2", Module(), *sample, shapes=shapes))
    assert [(spec.name, spec.datatype) for spec in model.signature.inputs] == [
        ("x", "FP32"),
        ("more_a", "FP32"),
        ("more_b_0", "BOOL"),
    ]
    answer = model.run(
        {"x": np.ones((3, 3), "f"), "more_a": np.ones((3, 3), "f"), "more_b_0": np.array([True, False, True])}
    )
    np.testing.assert_array_equal(answer["y"], np.full((3, 3), 5))
    np.testing.assert_array_equal(answer["parts_0"], [True, False, True])


NUMBERS = [datatype for datatype in DTYPES if datatype != "BYTES"]


@pytest.mark.parametrize("datatype", NUMBERS)
def test_every_datatype_goes_in_and_out(tmp_path: Path, datatype: str) -> None:
    file = save_scripted(tmp_path / "m.pt", Identity())
    model = load(file, x(-1, 2, datatype=datatype))
    assert model.signature.outputs[0].datatype == datatype
    bits = np.array([[0, 1], [1, 0]])
    rows = bits.astype(DTYPES[datatype])
    answer = model.run({"x": rows})["output_0"]
    assert answer.dtype == rows.dtype
    np.testing.assert_array_equal(answer, rows)


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_half_precision_is_computed_in_half_precision(tmp_path: Path) -> None:
    network = nn.Linear(4, 3).half().eval()
    model = load(save_exported(tmp_path / "m.pt2", network, torch.rand(2, 4).half()))
    rows = np.random.default_rng(0).random((5, 4)).astype(np.float16)
    answer = model.run({"input": rows})["output_0"]
    assert answer.dtype == np.float16
    np.testing.assert_allclose(answer, eager(network, rows), rtol=1e-2, atol=1e-3)


def test_an_optional_argument_may_be_left_out(tmp_path: Path) -> None:
    model = load(save_scripted(tmp_path / "m.pt", Biased()), x(-1, 2), TensorHint("bias", "FP32", (-1, 2)))
    assert [spec.optional for spec in model.signature.inputs] == [False, True]
    ones = np.ones((1, 2), np.float32)
    assert model.run({"x": ones})["output_0"].tolist() == [[1, 1]]
    assert model.run({"x": ones, "bias": ones})["output_0"].tolist() == [[2, 2]]
    alone = load(save_scripted(tmp_path / "m.pt", Biased()), x(-1, 2))
    assert [spec.name for spec in alone.signature.inputs] == ["x"], "nothing is known of the other"


class Biased(nn.Module):
    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, power: int = 1) -> torch.Tensor:
        return x**power if bias is None else x**power + bias


def test_inputs_are_known_from_a_golden_sample(tmp_path: Path) -> None:
    class Module(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return (ids * mask).sum(1) * scale[:, 0]

    file = save_scripted(tmp_path / "m.pt", Module())
    samples = (
        {"ids": [[1, 2, 3]], "mask": [[True, True, False]], "scale": [[1]]},
        {"ids": [[1, 2]], "mask": [[True, True]], "scale": [[0.5]]},
    )
    model = load(file, samples=samples)
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.signature.inputs] == [
        ("ids", "INT64", (-1, -1)),
        ("mask", "BOOL", (-1, -1)),
        ("scale", "FP32", (-1, 1)),
    ]
    bare = load(save_scripted(tmp_path / "m.pt", nn.Linear(3, 2)), samples=([[1.0, 2, 3]],))
    assert bare.signature.inputs[0].shape == (-1, 3)


def test_an_incomplete_signature_is_refused_with_the_lines_to_add(tmp_path: Path) -> None:
    file = save_scripted(tmp_path / "m.pt", networks.Mixed())
    with pytest.raises(LoadError) as caught:
        load(file, x(-1, 4))
    assert caught.value.detail.endswith('[[inputs]]\nname = "scale"\ndatatype = "FP32"\nshape = [-1, 64]')
    with pytest.raises(LoadError, match=r'describes the input "y", which the model does not have'):
        load(file, TensorHint("y"))


def test_an_argument_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
            return x * times

    with pytest.raises(LoadError, match='the argument "times" of forward is int, but only tensors'):
        load(save_scripted(tmp_path / "m.pt", Module()))


def test_an_output_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x, 1

    with pytest.raises(LoadError, match=r"output \[1\] is int"):
        load(save_scripted(tmp_path / "m.pt", Module()), x(-1, 2))


def test_a_datatype_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="complex64, which cannot be sent"):
        exported(tmp_path, torch.fft.rfft, torch.rand(2, 4))
    with pytest.raises(LoadError, match='input "x" is BYTES, which PyTorch does not support'):
        load(save_scripted(tmp_path / "m.pt", Identity()), x(-1, datatype="BYTES"))


def test_a_model_that_runs_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="neither its golden samples nor made-up rows"):
        load(save_scripted(tmp_path / "m.pt", nn.Linear(4, 2)), TensorHint("input", "FP32", (-1, 5)))


# How it runs.

TRANSLATED: dict[str, tuple[Callable[[Any], Any], torch.Tensor]] = {
    "split": (lambda x: torch.cat(torch.split(x, 2, dim=1)[::-1], 1), torch.rand(2, 8)),
    "index by tensors": (lambda x: x[torch.arange(x.shape[0]), 1], torch.rand(2, 8)),
    "made by size": (lambda x: torch.zeros(x.shape[0], 3, dtype=torch.float64) + x[:, :3], torch.rand(2, 8)),
    "sizes computed": (lambda x: x.reshape(x.shape[0] * 2, -1).view(x.shape[0], -1), torch.rand(2, 8)),
    "several results": (lambda x: tuple(torch.topk(x, 3)), torch.rand(2, 8)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), torch.rand(2, 6, 8)),
    "resize": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), torch.rand(2, 3, 8, 8)),
    "datatypes": (lambda x: x.half().to(torch.bfloat16).float().to(torch.int64), torch.rand(2, 8) * 9),
    "constants": (lambda x: torch.where(x > 0.5, x, torch.tensor(0.25)).clamp(0, 0.75), torch.rand(2, 8)),
    "in place": (lambda x: (x * 1).add_(1).relu_(), torch.rand(2, 8)),
    "whole numbers for floats": (lambda x: F.softplus(x, beta=1) + x**2, torch.rand(2, 8)),
    "its input": (lambda x: x, torch.rand(2, 8)),
}


@pytest.mark.parametrize("case", TRANSLATED)
def test_a_program_runs_without_python_and_gives_the_same(tmp_path: Path, case: str) -> None:
    function, sample = TRANSLATED[case]
    model = exported(tmp_path, function, sample)
    assert model.form == PROGRAM
    for rows in (1, 3, 4):
        batch = torch.rand(rows, *sample.shape[1:])
        expected = function(batch.clone())
        for got, want in zip(
            model.run({"x": batch.numpy()}).values(),
            expected if isinstance(expected, tuple) else [expected],
            strict=True,
        ):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,)), "true_graph"),
        (lambda x: torch.nonzero(x > 0), "operator.ge"),
    ],
)
def test_an_untranslatable_program_runs_as_python(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, function: Callable[[Any], Any], why: str
) -> None:
    model = exported(tmp_path, function, torch.randn(4, 3))
    assert model.form == f"{PROGRAM}, run as Python"
    assert why in caplog.text
    for rows in (np.ones((2, 3), np.float32), -np.ones((5, 3), np.float32)):
        np.testing.assert_array_equal(model.run({"x": rows})["output_0"], function(torch.tensor(rows)))


def test_a_program_that_keeps_state_runs_as_python(tmp_path: Path) -> None:
    network = nn.BatchNorm1d(4).train()
    model = load(save_exported(tmp_path / "m.pt2", network, torch.rand(4, 4)))
    assert model.form == f"{PROGRAM}, run as Python"


def test_a_program_refuses_sizes_that_it_was_not_exported_for(tmp_path: Path) -> None:
    few = torch.export.Dim("few", max=12)
    module = Function(lambda x: x * 2)
    model = load(save_exported(tmp_path / "m.pt2", module, torch.rand(2, 3), shapes=({0: few},)))
    assert model.max_rows == 12
    assert len(model.run({"x": np.ones((12, 3), np.float32)})["output_0"]) == 12
    with pytest.raises(AssertionError, match="Guard failed"):
        model.run({"x": np.ones((13, 3), np.float32)})


def test_a_module_is_frozen_only_where_that_changes_no_answer(tmp_path: Path) -> None:
    class Lossy(nn.Module):
        """Folding this normalisation into the weights overflows them."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(1)
            nn.init.constant_(self.conv.weight, 1e-30)
            nn.init.constant_(self.norm.weight, 1e30)
            self.norm.running_var.fill_(1e-30)
            self.norm.eps = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x))

    module = Lossy().eval()
    model = load(save_scripted(tmp_path / "m.pt", module), x(-1, 1, 2, 2))
    rows = np.ones((1, 1, 2, 2), np.float32)
    np.testing.assert_allclose(model.run({"x": rows})["output_0"], eager(module, rows))


@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_a_model_that_writes_to_its_input_leaves_the_requests_alone(tmp_path: Path, kind: str) -> None:
    if kind == "exported":
        model = exported(tmp_path, lambda x: x.add_(1) * 2, torch.rand(2, 3))
    else:
        model = load(save_scripted(tmp_path / "m.pt", AddsInPlace()), x(-1, 3))
    rows = np.zeros((2, 3), np.float32)
    for _ in range(3):
        assert model.run({"x": rows})["output_0"].tolist() == [[2, 2, 2]] * 2
    assert not rows.any()


class AddsInPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[:, :2]
        first.add_(1)
        x[:, 2] += 1
        return x * 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    array=arrays.arrays(
        st.sampled_from([np.float32, np.int64, np.bool_, np.float16, np.uint8]),
        arrays.array_shapes(min_side=0),
    ),
    read_only=st.booleans(),
    step=st.sampled_from([1, -1, 2]),
    copy=st.booleans(),
)
def test_any_array_becomes_a_tensor_and_back(
    array: np.ndarray, read_only: bool, step: int, copy: bool
) -> None:
    """Read-only, strided and empty ones too, without a warning; a copy shares nothing."""
    array = array[::step]
    array.flags.writeable = not read_only
    tensor = to_tensor(array, "FP32", copy=copy)
    back = to_array(tensor)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    if array.size and (copy or step != 1):
        assert copy is False or not np.shares_memory(back, array)


def test_an_array_that_is_not_aligned_becomes_a_tensor() -> None:
    body = b"?" + np.arange(5, dtype=np.float32).tobytes()
    array = np.frombuffer(body, np.float32, offset=1)
    assert to_array(to_tensor(array, "FP32", copy=False)).tolist() == [0, 1, 2, 3, 4]


def test_models_keep_their_own_number_of_threads(tmp_path: Path) -> None:
    seen: dict[int, set[int]] = {1: set(), 2: set()}
    models = {}
    for threads in seen:
        file = save_exported(tmp_path / f"{threads}.pt2", nn.Linear(4, 2), torch.rand(2, 4))
        models[threads] = load(file, threads=threads)

    def work(threads: int) -> None:
        for _ in range(50):
            models[threads].run({"input": np.ones((2, 4), np.float32)})
            seen[threads].add(torch.get_num_threads())

    workers = [threading.Thread(target=work, args=(threads,)) for threads in seen]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(threads in seen[threads] for threads in seen)


class Slow(nn.Module):
    """Half a second or so of work in few operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(800))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = torch.tanh(x @ self.weight)
        return x


@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_other_threads_work_on_while_a_model_runs(tmp_path: Path, kind: str) -> None:
    if kind == "exported":
        model = load(save_exported(tmp_path / "m.pt2", Slow(), torch.rand(2, 800)))
        assert model.form == PROGRAM
    else:
        model = load(save_scripted(tmp_path / "m.pt", Slow()), x(-1, 800))
    inputs = {"x": np.ones((400, 800), np.float32)}
    # A busy machine may take the core from the other thread for a while.
    assert any(longest_standstill(model, inputs) < 0.5 for _ in range(5))


def longest_standstill(model: LoadedModel, inputs: dict[str, np.ndarray]) -> float:
    """The longest time that another thread could not run for while `model` ran, as a part of its run."""
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        model.run(inputs)
        span.append(time.perf_counter())

    stamps = []
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        stamps.append(time.perf_counter())
    began, ended = span
    inside = [began, *(stamp for stamp in stamps if began < stamp < ended), ended]
    return max(np.diff(inside)) / (ended - began)


def test_instances_share_one_models_weights_and_answer_right_at_the_same_time(tmp_path: Path) -> None:
    network = networks.digits()
    model = load(save_exported(tmp_path / "m.pt2", network, torch.rand(2, 1, 8, 8)))
    wrong: list[int] = []

    def work(number: int) -> None:
        images = np.random.default_rng(number).random((number + 1, 1, 8, 8), np.float32)
        expected = eager(network, images)
        answers = [model.run({"input": images})["output_0"] for _ in range(20)]
        wrong.extend(number for answer in answers if not np.allclose(answer, expected, atol=1e-4))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


class Deep(nn.Module):
    """So many operations that planning them takes far longer than running them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(100):
            x = torch.tanh(x * float(number)) + x.sigmoid()
        return x


@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_the_slow_first_runs_are_over_when_a_model_is_loaded(tmp_path: Path, kind: str) -> None:
    """Those of batch sizes that were never run before, too."""
    if kind == "exported":
        model = load(save_exported(tmp_path / "m.pt2", Deep(), torch.rand(2, 4)))
    else:
        model = load(save_traced(tmp_path / "m.pt", Deep(), torch.rand(2, 4)), x(-1, 4))
    firsts: list[float] = []
    later: list[float] = []
    for rows in (1, 2, 3, 5, 7, 8):
        for times in (firsts, later, later, later):
            began = time.process_time()
            model.run({"x": np.ones((rows, 4), np.float32)})
            times.append(time.process_time() - began)
    assert max(firsts) < 20 * np.median(later), "cold it takes fifty times as long"


def test_a_program_for_another_device_runs_whatever_its_strides_are() -> None:
    """Attention on CUDA gives strides that no view of the exporter's device fits; here a caller does."""

    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).view(x.shape[0], -1)

    rows = torch.rand(5, 4, 3).transpose(1, 2)
    dim = torch.export.Dim("rows")
    program = torch.export.export(Flat().eval(), (torch.rand(2, 3, 4),), dynamic_shapes=({0: dim},))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        program.module()(rows)
    views_to_reshapes(program)
    assert torch.equal(program.module()(rows), rows.reshape(5, -1))
