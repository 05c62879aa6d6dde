"""What is imported: the framework of a source, the rows of an example, and whether answers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.errors import ConfigError, InvalidInput
from inferpool.import_command.comparison import compare_answers
from inferpool.import_command.conversion_run import Converted
from inferpool.import_command.example import read_example
from inferpool.import_command.frameworks import BY_SUFFIX, SCRIPTS, recognise_source
from inferpool.import_command.imported_model import make_sample, write_model
from inferpool.release import importers
from inferpool.release.build import missing_packages


def test_every_suffix_has_a_script_whose_packages_can_be_read(tmp_path: Path) -> None:
    assert set(BY_SUFFIX.values()) <= set(SCRIPTS)
    for script in SCRIPTS.values():
        missing_packages(Path(importers.__file__).with_name(script))
    for suffix, framework in BY_SUFFIX.items():
        (tmp_path / f"model{suffix}").touch()
        found = recognise_source(str(tmp_path / f"model{suffix}"), None, weights=False, trusted=True)
        assert (found.framework, found.name) == (framework, f"model{suffix}")


def test_a_module_of_pytorch_is_trusted_by_a_flag_and_named_with_its_function(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.touch()
    (tmp_path / "net.pt").touch()
    found = recognise_source(f"{file}:build", None, weights=True, trusted=True)
    assert (found.path, found.function, found.name) == (file, "build", "net.py:build")
    for source, weights, trusted, problem in (
        (f"{file}:build", True, False, "net.py:build runs the code in it: .* add --trust"),
        (str(tmp_path / "net.pt"), False, False, "is a pickle, which can run code: .* add --trust"),
        (str(tmp_path / "net.pt"), True, True, "--weights are for a module of PyTorch"),
        (str(file), False, True, "name the function"),
        (f"{file}x:build", False, True, "is no file"),
        (str(tmp_path), False, True, "no SavedModel of TensorFlow"),
        (str(tmp_path / "no.cbm"), False, True, "is no file"),
    ):
        with pytest.raises(ConfigError, match=problem):
            recognise_source(source, None, weights=weights, trusted=trusted)


def test_a_saved_model_is_its_folder(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").touch()
    for source in (tmp_path, tmp_path / "saved_model.pb"):
        found = recognise_source(str(source), None, weights=False, trusted=False)
        assert (found.path, found.framework) == (tmp_path, "tensorflow")


def test_an_empty_cell_is_a_missing_number_or_an_empty_string(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("size,city\n1.5,Bern\n,\n")
    columns = read_example(tmp_path / "rows.csv")
    assert columns["size"].tolist()[:1] == [1.5]
    assert np.isnan(columns["size"][1])
    assert columns["city"].tolist() == ["Bern", ""]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a,b\n1\n", "row 2 has 1 cells; expected 2"), ("a\n", "has no rows"), ("", "has no rows")],
)
def test_an_example_without_complete_rows_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InvalidInput, match=problem):
        read_example(tmp_path / "rows.csv")


def test_arrays_of_an_example_have_as_many_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", a=np.zeros((3, 2)), b=np.zeros(2))
    with pytest.raises(InvalidInput, match="differ in their number of rows"):
        read_example(tmp_path / "rows.npz")


def test_answers_may_differ_by_the_tolerance_or_that_share_of_the_answer() -> None:
    expected = {"y": np.array([[0.0], [np.nan], [1e6]])}
    assert compare_answers({"y": np.array([[5e-5], [np.nan], [1e6 + 50]])}, expected, 1e-4, "X") == 50
    with pytest.raises(InvalidInput, match=r'output "y" differs from X by 0\.0002, more than 0\.0001'):
        compare_answers({"y": np.array([[2e-4], [np.nan], [1e6]])}, expected, 1e-4, "X")
    with pytest.raises(InvalidInput, match="differs"):
        compare_answers({"y": np.array([[0.0], [0.0], [1e6]])}, expected, 1e-4, "X")
    with pytest.raises(InvalidInput, match=r'output "y" is of shape \[3\]; X answers \[3, 1\]'):
        compare_answers({"y": np.zeros(3)}, expected, 1e-4, "X")
    with pytest.raises(InvalidInput, match='output "y" is missing'):
        compare_answers({}, expected, 1e-4, "X")
    with pytest.raises(InvalidInput, match="other strings"):
        compare_answers({"y": np.array(["a"], object)}, {"y": np.array(["b"])}, 1e-4, "X")


def test_a_sample_has_null_for_what_is_missing_and_fewer_rows_if_they_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = {"a": np.array([[0.1], [np.nan], [3], [4]], np.float32), "b": np.array(["x", "", "y", "z"])}
    sample = make_sample(inputs, {"y": np.array([1, 2, 3, 4])}, 0.5)
    assert sample == (
        b'{"inputs":{"a":[[0.1],[null],[3.0]],"b":["x","","y"]},"outputs":{"y":[1,2,3]},"tolerance":0.5}\n'
    )
    monkeypatch.setattr("inferpool.import_command.imported_model.MOST_SAMPLE_BYTES", len(sample) - 1)
    assert b'"y":[1,2]}' in make_sample(inputs, {"y": np.array([1, 2, 3, 4])}, 0.5)
    monkeypatch.setattr("inferpool.import_command.imported_model.MOST_SAMPLE_BYTES", 9)
    with pytest.raises(InvalidInput, match="too large"):
        make_sample(inputs, {"y": np.array([1, 2, 3, 4])}, 0.5)


def test_names_of_classes_need_scores(tmp_path: Path) -> None:
    about: dict[str, Any] = {"kind": "Ridge", "framework": "X", "converter": "Y", "scores": None}
    about |= {"activation": "none", "tables": "", "licence": "", "notes": [], "packages": {}}
    rows = {"a": np.zeros((1, 1))}
    converted = Converted(tmp_path / "model.onnx", about, rows, rows)
    with pytest.raises(InvalidInput, match="no scores of classes, which --labels could name"):
        write_model(tmp_path / "m", converted, ["cat", "dog"], "m.pkl", "rows.csv", 1e-4)
