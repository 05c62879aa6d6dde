"""`inferpool evaluate` on real models: pictures by class, tables with slices, versions side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from inferpool import cli
from inferpool.errors import InvalidInput
from inferpool.evaluate_command.labelled_rows import read_labelled
from onnx import numpy_helper

from tests.server import ROOT

MODELS = ROOT / "models"


def test_pictures_in_a_folder_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted((MODELS / "digits" / "samples").glob("*.png")):
        (tmp_path / "data" / file.stem).mkdir(parents=True)
        shutil.copy(file, tmp_path / "data" / file.stem)
    rows = len(list((tmp_path / "data").iterdir()))
    wrong = tmp_path / "data" / "7"
    wrong.rename(tmp_path / "data" / "2")
    arguments = ["evaluate", str(MODELS / "digits"), "--data", str(tmp_path / "data")]
    assert cli.main([*arguments, "--report", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(1 - 1 / rows)
    assert report["confusion"][2][7] == 1
    assert report["version"] == "1"
    assert f"digits 1, classification, {rows} rows" in capsys.readouterr().out


def add_worse_version(model: Path) -> None:
    """Write version 2 of `diabetes`, which answers 100 more than version 1."""
    network = onnx.load(model / "1" / "model.onnx")
    [output] = network.graph.output
    for node in network.graph.node:
        node.output[:] = ["less" if name == output.name else name for name in node.output]
    network.graph.node.append(onnx.helper.make_node("Add", ["less", "more"], [output.name]))
    network.graph.initializer.append(numpy_helper.from_array(np.array([100], np.float32), "more"))
    (model / "2").mkdir()
    onnx.save(network, model / "2" / "model.onnx")
    shutil.rmtree(model / "samples")  # they are of version 1


def test_a_table_with_slices_beside_another_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyarrow import csv, parquet
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    table = np.column_stack([found.data, found.target])[:60]
    header = ",".join([*found.feature_names, "outcome", "clinic"])
    lines = [
        ",".join([*map(repr, map(float, row)), "north" if number % 2 else "south"])
        for number, row in enumerate(table)
    ]
    data = tmp_path / "data.csv"
    data.write_text("\n".join([header, *lines]) + "\n")
    parquet.write_table(csv.read_csv(data), tmp_path / "data.parquet")
    shutil.copytree(MODELS / "diabetes", tmp_path / "diabetes")
    add_worse_version(tmp_path / "diabetes")
    model, report_folder = str(tmp_path / "diabetes"), tmp_path / "report"
    flags = ["--target", "outcome", "--slice", "clinic", "--ignore", "clinic", "--report", str(report_folder)]
    compared = ["--data", str(tmp_path / "data.parquet"), "--version", "1", "--against", "2"]
    assert cli.main(["evaluate", model, *compared, *flags]) == 0
    report = json.loads((report_folder / "evaluation.json").read_text())
    assert report["slices"]["clinic"]["north"]["rows"] == 30
    assert (report["version"], report["against"]["version"]) == ("1", "2")
    assert 40 < report["metrics"]["rmse"]["value"] < 70
    differences = report["against"]["differences"]
    # On the same rows, so that the interval of a difference that every row has is narrow.
    assert [*differences["mean_error"].values()] == pytest.approx([-100] * 3, abs=1e-3)
    assert -100 < differences["rmse"]["low"] < differences["rmse"]["high"] < -20
    assert "larger than diabetes 2 by" in capsys.readouterr().out
    wrong = ["--target", "clinic", "--ignore", "outcome"]
    assert cli.main(["evaluate", model, "--data", str(data), *wrong]) == 1
    assert "the targets of a regression are numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "x,y\n1,2\n", 'no column "target"; it has x, y'),
        ("a.csv", "x,target\n1,\n", 'row 0 has no value in "target"'),
        ("a.csv", "x,target\n", "no rows"),
        ("a.csv", "target\n1\n", 'no columns beside "target"'),
        ("a.jsonl", "{", "cannot be read"),
        ("a.npz", "x", "no arrays"),
        ("a.xls", "", "expected .csv"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=problem):
        read_labelled(tmp_path / name, None)


def test_a_column_of_strings_holds_sentences_and_an_array_needs_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good", "target": 1}\n{"text": "bad", "target": 0}\n')
    rows = read_labelled(tmp_path / "a.jsonl", None)
    assert (rows.inputs, list(rows.targets)) == (["good", "bad"], [1, 0])
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), target=np.zeros(2))
    with pytest.raises(InvalidInput, match="as many rows"):
        read_labelled(tmp_path / "a.npz", None)


def test_mistakes_in_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(tmp_path / "none"), "--data", "x.csv"]) == 2
    assert "does not exist" in capsys.readouterr().err
