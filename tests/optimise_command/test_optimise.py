"""`inferpool optimise` writes a version that is faster and good enough, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from inferpool import cli
from inferpool.backends.base import LoadOptions, TensorRTPlan
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.optimise_command import structured_forms
from inferpool.optimise_command.gpu import tensorrt_form
from inferpool.optimise_command.model_folders import find_source
from inferpool.optimise_command.structured_forms import make_structured
from inferpool.release.optimise import candidates, timing
from inferpool.release.optimise.candidates import (
    CANDIDATES,
    Candidate,
    optimise_graph,
    prune,
    store_in_bf16,
    to_int8_static,
)
from inferpool.release.optimise.timing import Timing
from inferpool.release.optimise.unfit import Unfit
from inferpool.settings import Settings
from onnx import numpy_helper

from tests.evaluate_command.test_retrieval import write
from tests.fake_gpu import FakeCard, FakeModel
from tests.release.optimise.test_candidates import rows, write_network
from tests.server import ROOT
from tests.text_models import write_encoder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose data is what it answers itself, so any other answer is worse."""
    folder = tmp_path / "net"
    (folder / "1").mkdir(parents=True)
    write_network(folder / "1" / "model.onnx")
    (folder / "labels.txt").write_text("ant\nbee\ncat\n")
    (folder / "model.toml").write_text(
        '[labels]\nactivation = "softmax"\n\n[versions]\nlabels = {stable = 1}\n'
    )
    session = ort.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    best = session.run(None, {"x": rows(200)})[0].argmax(axis=1)
    np.savez(tmp_path / "data.npz", x=rows(200), target=best)
    return folder


BUILD_SCRIPT = """
import onnx
import torch
from onnx import helper, numpy_helper

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 128), torch.nn.Linear(128, 3, bias=False)

    def forward(self, rows):
        return self.second(torch.relu(self.first(rows)))

def load_network(version):
    stored = onnx.load(version / "model.onnx").graph.initializer
    first, bias, second = (torch.from_numpy(numpy_helper.to_array(each).copy()) for each in stored)
    network = Network()
    network.load_state_dict({"first.weight": first.T, "first.bias": bias, "second.weight": second.T})
    return network

def fine_tune(network, epochs, seed):
    if network.first.out_features == 16:
        raise ValueError("too few")
    with torch.no_grad():
        if network.first.out_features == 96:
            network.second.weight.neg_()  # a planted form: as fast as can be, and wrong
        network.first.weight += 1e-6 * (epochs + torch.randn_like(network.first.weight))

def export_network(network, file):
    names = {"w1": network.first.weight.T, "b1": network.first.bias, "w2": network.second.weight.T}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w1", "b1"], ["b"]), helper.make_node("Relu", ["b"], ["c"]),
         helper.make_node("MatMul", ["c", "w2"], ["y"])],
        "network",
        [helper.make_tensor_value_info("x", 1, ["rows", 64])],
        [helper.make_tensor_value_info("y", 1, ["rows", 3])],
        [numpy_helper.from_array(value.detach().numpy().copy(), name) for name, value in names.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
"""
"""Its network has 128 channels, of which the second half counts for nothing."""


def damage(model: Path, target: Path, batches: Sequence[Any]) -> None:
    """A planted form: as fast as can be, and wrong."""
    loaded = onnx.load(model)
    for tensor in loaded.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(loaded, target)


def fail(model: Path, target: Path, batches: Sequence[Any]) -> None:
    raise Unfit("nothing to change")


def with_gains(
    monkeypatch: pytest.MonkeyPatch,
    forms: dict[str, tuple[Any, float]],
    structured: dict[str, float] | None = None,
) -> None:
    """Have these forms, each as much faster than the original as told: a busy machine decides nothing."""
    known = {each.name: each for each in CANDIDATES}
    made = (known.get(name) or Candidate(name, each[0]) for name, each in forms.items())
    monkeypatch.setattr(candidates, "CANDIDATES", tuple(made))
    gains = {name: each[1] for name, each in forms.items()} | {"original": 1.0} | (structured or {})

    def told(files: dict[str, Path], *_: object, **__: object) -> tuple[dict[str, Timing], dict[str, str]]:
        sizes = {name: timing.SIZES[:-1] if gains[name] < 0.1 else timing.SIZES for name in files}
        return {name: Timing(dict.fromkeys(sizes[name], 1.0), [gains[name]] * 9) for name in files}, {}

    monkeypatch.setattr(timing, "time_forms", told)


def optimise(model: Path, *flags: str) -> int:
    data = str(model.parent / "data.npz")
    return cli.main(["optimise", str(model), "--data", data, "--goal", "accuracy -3pp", *flags])


def test_the_fastest_good_form_becomes_a_version_with_its_provenance(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_gains(
        monkeypatch,
        {
            "planted": (damage, 9.0),
            "bf16-weights": (store_in_bf16, 8.0),
            "int8-static": (to_int8_static, 1.5),
            "unfit": (fail, 5.0),
        },
    )
    assert optimise(model, "--keep-fp32", "Relu") == 0
    shown = capsys.readouterr().out
    assert "worse than accuracy -3pp" in shown
    assert "cannot be made: nothing to change" in shown
    assert f"int8-static is version 2: {model / '2'}" in shown
    written = json.loads((model / "2" / "provenance.json").read_text())
    assert (written["form"], written["source"]["version"], written["data"]["rows"]) == ("int8-static", 1, 200)
    verdicts = {each["form"]: each["verdict"] for each in written["forms"]}
    assert (verdicts["int8-static"], verdicts["bf16-weights"]) == ("good", "reported only")
    assert written["forms"][0]["metric"] == 1.0
    assert written["forms"][0]["p50_ms"] == {"1": 1.0, "8": 1.0, "64": 1.0}
    assert written["forms"][0]["rows_per_s"] == {"1": 1000.0, "8": 8000.0, "64": 64000.0}
    assert written["kept_in_fp32"] == ["Relu"]
    first = (model / "2" / "model.onnx").read_bytes()
    shutil.rmtree(model / "2")
    assert optimise(model) == 0
    assert (model / "2" / "model.onnx").read_bytes() == first
    assert sorted(each.name for each in model.iterdir()) == ["1", "2", "labels.txt", "model.toml"]


def test_forms_of_a_real_model_are_timed_and_judged_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How fast they are is the machine's business; which form is bad is not."""
    shutil.copytree(ROOT / "models" / "digits", tmp_path / "digits")
    pictures = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    session = ort.InferenceSession(
        tmp_path / "digits" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    best = session.run(None, {"image": pictures})[0].argmax(axis=1)
    np.savez(tmp_path / "data.npz", image=pictures, target=best)
    forms = tuple(each for each in CANDIDATES if each.name in ("graph", "bf16", "int8-dynamic"))
    monkeypatch.setattr(candidates, "CANDIDATES", (*forms, Candidate("planted", damage)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    goal = ["--data", str(tmp_path / "data.npz"), "--goal", "accuracy -1pp", "--no-write"]
    assert cli.main(["optimise", str(tmp_path / "digits"), *goal]) == 0
    shown, bars = capsys.readouterr()
    speed, _, worth = shown.partition("\n\n")
    rows = {line.split()[0]: line for line in speed.splitlines()}
    assert rows.keys() >= {"original", "graph", "int8-dynamic", "planted"}
    for name in ("original", "graph", "planted"):
        size, *p50_ms = map(float, rows[name].split()[1:5])
        assert 0.1 < size < 0.2
        assert 0 < p50_ms[0] < p50_ms[2] < 1000
        rates = map(float, rows[name].split()[5:8])
        assert list(rates) == pytest.approx(
            [1e3 * each / ms for each, ms in zip((1, 8, 64), p50_ms, strict=True)], rel=1e-3
        )
    assert re.search(r"^planted .*worse than accuracy -1pp$", worth, re.MULTILINE)
    # ONNX Runtime's own reasons, in the width of a terminal.
    assert re.search(
        r"^bf16 .*cannot run: ONNX Runtime cannot load model.onnx: Could not", worth, re.MULTILINE
    )
    assert "was built without TensorRT" in " ".join(worth.split())
    assert max(map(len, shown.splitlines())) <= 120
    assert "planted is the best form" not in shown
    assert "making int8-dynamic" in bars
    assert "measurement/s" in bars
    assert "evaluating planted" in bars
    assert f"{len(best)}/{len(best)}" in bars


def test_a_model_of_embeddings_is_judged_by_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "[text]\nmax_tokens = 128\n[text.embeddings]\npooling = 'mean'\n"
    write_encoder(tmp_path, "encoder", config)
    with_gains(monkeypatch, {"planted": (damage, 9.0), "graph": (optimise_graph, 1.5)})
    data = str(write(tmp_path / "data"))
    goal = ["--goal", "mrr_at_10 -1pp", "--no-write"]
    assert cli.main(["optimise", str(tmp_path / "encoder"), "--data", data, *goal]) == 0
    assert "graph is the best form" in capsys.readouterr().out


def test_weights_in_files_of_their_own_come_along(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model / "1" / "model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with_gains(monkeypatch, {"int8-static": (to_int8_static, 1.5)})
    assert optimise(model) == 0
    assert "int8-static is version 2" in capsys.readouterr().out
    assert sorted(each.name for each in (model / "2").iterdir()) == ["model.onnx", "provenance.json"]


def test_nothing_is_written_that_is_not_faster_or_fails_the_samples(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "build.py").write_text("raise AssertionError('nobody asked for it')\n")
    forms = {
        "int8-static": (to_int8_static, 1.04),
        "unstructured-50": (prune, 9.0),
        "graph": (optimise_graph, 0.05),
    }
    with_gains(monkeypatch, forms)
    assert optimise(model, "--goal", "accuracy -100pp") == 0
    shown = capsys.readouterr().out
    assert "  not faster\n" in shown
    assert "  not faster (too slow with fewer rows to time it with 64)\n" in shown
    assert "reported only" in shown
    (model / "samples").mkdir()
    session = ort.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    answer = session.run(None, {"x": rows(1)})[0].tolist()
    sample = {"inputs": rows(1).tolist(), "outputs": {"y": answer}, "tolerance": 1e-6}
    (model / "samples" / "one.json").write_text(json.dumps(sample))
    with_gains(monkeypatch, {"int8-static": (to_int8_static, 1.5)})
    assert optimise(model) == 0
    assert "refused by golden samples" in capsys.readouterr().out
    assert not (model / "2").exists()


def test_a_version_that_would_answer_at_once_is_not_made(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.toml").write_text('[labels]\nactivation = "softmax"\n')
    assert optimise(model) == 2
    assert "labels = {stable = 1}" in capsys.readouterr().err
    assert cli.main(["optimise", str(model), "--data", "none.npz", "--goal", "speed +1"]) == 2
    assert optimise(model, "--no-write", "--keep-fp32", "MatMul", "--keep-fp32", "Softmax") == 2
    assert "--keep-fp32 Softmax: the model has no such node" in capsys.readouterr().err


def test_a_form_with_fewer_channels_is_trained_on_by_the_build_script(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model / "1" / "model.onnx"
    network = onnx.load(file)
    for tensor in network.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        values[(Ellipsis, slice(64, None)) if tensor.name != "w2" else slice(64, None)] *= 1e-3
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(network, file)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    best = session.run(None, {"x": rows(200)})[0].argmax(axis=1)
    np.savez(model.parent / "data.npz", x=rows(200), target=best)
    made: dict[str, bytes] = {}

    def make(*given: Any) -> tuple[dict[str, Path], dict[str, str]]:
        files, reasons = make_structured(*given)
        made.update({name: file.read_bytes() for name, file in files.items()})
        return files, reasons

    monkeypatch.setattr(structured_forms, "make_structured", make)
    monkeypatch.setattr(structured_forms, "PERCENTS", (25, 50, 51, 95))
    with_gains(monkeypatch, {}, {"structured-25": 9.0, "structured-50": 1.5, "structured-51": 1.0})
    assert optimise(model, "--fine-tune", "1") == 2
    assert "it loads the network and trains it" in capsys.readouterr().err
    (model / "build.py").write_text(BUILD_SCRIPT)
    assert optimise(model, "--fine-tune", "1") == 0
    assert "structured-50 is version 2" in capsys.readouterr().out
    written = json.loads((model / "2" / "provenance.json").read_text())
    assert {each["form"]: each["verdict"] for each in written["forms"]} == {
        "original": "",
        "structured-25": "worse than accuracy -3pp",
        "structured-50": "good",
        "structured-51": "not faster",
        "structured-95": "cannot be made: ValueError: too few",
        "tensorrt": f"not tried: the installed onnxruntime {ort.__version__} was built without TensorRT",
    }
    assert written["fine_tuning"]["epochs"] == 1
    assert written["fine_tuning"]["tools"]["torch-pruning"] == version("torch-pruning")
    # Of 128 channels 64 stay in both, so the second is the first, made again from the same seed.
    assert (model / "2" / "model.onnx").read_bytes() == made["structured-50"] == made["structured-51"]


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[tuple[str, ...]]:
    """Have TensorRT, so many times as fast as CUDA, on a made-up GPU; returns the devices that were asked."""
    asked: list[tuple[str, ...]] = []

    def time_on_gpu(*_: object) -> tuple[dict[str, Timing], dict[str, str]]:
        found = {name: Timing(dict.fromkeys(timing.SIZES, 1.0), [each] * 9) for name, each in gains.items()}
        return found, {"cuda": "what tensorrt is compared with"}

    def on_gpu(settings: Settings) -> Settings:
        asked.append(chosen(settings).devices)
        return settings

    gains = {"cuda": 1.0, "tensorrt": gain}
    chosen = tensorrt_form.on_gpu
    monkeypatch.setattr(OnnxBackend, "tensorrt_unavailable_reason", lambda _: None)
    monkeypatch.setattr(tensorrt_form, "time_on_gpu", time_on_gpu)
    monkeypatch.setattr(tensorrt_form, "on_gpu", on_gpu)
    return asked


def test_tensorrt_is_compared_with_cuda_and_is_a_setting_not_a_version(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_gains(monkeypatch, {"planted": (damage, 9.0)})
    asked = on_a_gpu(monkeypatch, 2.0)
    monkeypatch.setattr(tensorrt_form, "await_tensorrt", lambda client: None)
    assert optimise(model) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"^tensorrt .* good: write tensorrt = true below \[gpu\] in model.toml$",
        re.sub(" +", " ", shown),
        re.MULTILINE,
    ), shown
    assert re.search(r"^cuda +– +– +– +what tensorrt is compared with$", shown, re.MULTILINE)
    assert "nothing is written" in shown
    assert asked == [("cuda:0",)]


def test_tensorrt_is_refused_if_cuda_goes_on_serving(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This machine has no GPU at all."""
    with_gains(monkeypatch, {})
    on_a_gpu(monkeypatch, 2.0)
    assert optimise(model) == 0
    assert re.search(
        "^tensorrt .*cannot be served: the model is on no GPU$", capsys.readouterr().out, re.MULTILINE
    )


@pytest.mark.parametrize(
    "table",
    [
        "",
        "[gpu]\n",
        "[gpu] # fast\ntf32 = true\ntensorrt = false\n[queue]\nmax_rows = 9\n",
        "[gpu]\ntensorrt=true",
    ],
)
def test_tensorrt_is_switched_on_in_a_copy_of_the_settings(table: str) -> None:
    found = tomllib.loads(tensorrt_form.add_tensorrt(table))
    before = tomllib.loads(table)
    assert found == before | {"gpu": before.get("gpu", {}) | {"tensorrt": True}}


def test_the_first_gpu_that_is_named_is_asked() -> None:
    for devices, one in ((("auto",), "cuda:0"), (("cuda:2", "cuda:3"), "cuda:2"), (("cpu",), "cuda:0")):
        assert tensorrt_form.on_gpu(Settings(devices=devices)).devices == (one,)


def test_cuda_that_cannot_run_the_model_leaves_tensorrt_untried(model: Path, tmp_path: Path) -> None:
    batches = timing.batches_of([{"x": rows(2)}])
    found, reasons = tensorrt_form.time_on_gpu(find_source(model, None), batches, tmp_path, Settings(), print)
    assert found == {}
    assert reasons["cuda"].startswith("cannot run: the model cannot be timed: ")
    assert reasons["tensorrt"] == "not tried: CUDA cannot run the model"


def test_tensorrt_gets_a_plan_for_the_largest_batch_and_the_models_settings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[FakeModel] = []

    def load(_: OnnxBackend, file: Path, options: LoadOptions) -> FakeModel:
        loaded.append(FakeModel(FakeCard(), options))
        return loaded[-1]

    seconds = iter([2.0, 1.0, 1.0, 2.0] * 100)  # the two take turns
    monkeypatch.setattr(OnnxBackend, "load", load)
    monkeypatch.setattr(timing, "_run_s", lambda *_: [next(seconds)])
    (model / "model.toml").write_text("[gpu]\ntf32 = true\n")
    batches = {8: {"x": np.zeros((8, 4), np.float32)}}
    source = find_source(model, None)
    found, reasons = tensorrt_form.time_on_gpu(source, batches, tmp_path, Settings(), lambda count: None)
    assert reasons == {"cuda": "what tensorrt is compared with"}
    assert found["tensorrt"].gains == pytest.approx([2.0] * 9)
    assert [each.options.device for each in loaded] == ["cuda:0", "cuda:0"]
    assert [each.options.gpu.tf32 for each in loaded] == [True, True]
    assert [each.options.gpu.tensorrt for each in loaded] == [
        None,
        TensorRTPlan(tmp_path, (("x", (64, 4)),)),
    ]
    assert all(each.closed for each in loaded)
