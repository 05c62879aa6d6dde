"""`inferpool optimise` writes a version that is faster and good enough, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from inferpool import cli
from inferpool.release.optimise import candidates, timing
from inferpool.release.optimise.candidates import Candidate, to_int8_static
from inferpool.release.optimise.timing import Timing
from onnx import numpy_helper

from tests.release.optimise.test_candidates import rows, write_network


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


def damage(model: Path, target: Path, batches: Sequence[Any]) -> None:
    """A planted form: as fast as can be, and wrong."""
    loaded = onnx.load(model)
    for tensor in loaded.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(loaded, target)


def fail(model: Path, target: Path, batches: Sequence[Any]) -> None:
    raise candidates.Unfit("nothing to change")


def with_gains(monkeypatch: pytest.MonkeyPatch, forms: dict[str, tuple[Any, float]]) -> None:
    """Have these forms, each as much faster than the original as told: a busy machine decides nothing."""
    monkeypatch.setattr(
        candidates, "CANDIDATES", tuple(Candidate(name, each[0]) for name, each in forms.items())
    )
    gains = {name: each[1] for name, each in forms.items()} | {"original": 1.0}

    def told(files: dict[str, Path], *_: object) -> tuple[dict[str, Timing], dict[str, str]]:
        return {name: Timing(dict.fromkeys(timing.SIZES, 1.0), [gains[name]] * 9) for name in files}, {}

    monkeypatch.setattr(timing, "time_forms", told)


def optimise(model: Path, *flags: str) -> int:
    data = str(model.parent / "data.npz")
    return cli.main(["optimise", str(model), "--data", data, "--goal", "accuracy -3pp", *flags])


def test_the_fastest_good_form_becomes_a_version_with_its_provenance(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_gains(
        monkeypatch,
        {"planted": (damage, 9.0), "int8-static": (to_int8_static, 1.5), "unfit": (fail, 5.0)},
    )
    assert optimise(model) == 0
    shown = capsys.readouterr().out
    assert "worse than accuracy -3pp" in shown
    assert "cannot be made: nothing to change" in shown
    assert f"int8-static is version 2: {model / '2'}" in shown
    written = json.loads((model / "2" / "provenance.json").read_text())
    assert (written["form"], written["source"]["version"], written["data"]["rows"]) == ("int8-static", 1, 200)
    verdicts = {each["form"]: each["verdict"] for each in written["forms"]}
    assert verdicts["int8-static"] == "good"
    assert written["forms"][0]["metric"] == 1.0
    first = (model / "2" / "model.onnx").read_bytes()
    shutil.rmtree(model / "2")
    assert optimise(model) == 0
    assert (model / "2" / "model.onnx").read_bytes() == first
    assert sorted(each.name for each in model.iterdir()) == ["1", "2", "labels.txt", "model.toml"]


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
    with_gains(monkeypatch, {"int8-static": (to_int8_static, 1.04)})
    assert optimise(model) == 0
    assert "not faster" in capsys.readouterr().out
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
