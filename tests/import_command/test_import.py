"""`inferpool import`: versions that answer as the framework does, or nothing."""

from __future__ import annotations

import json
import pickle
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from inferpool import cli

from tests.import_command.scripts import script

# The tests import scikit-learn and pandas themselves: they take seconds of each process that collects tests.


def test_a_classifier_keeps_its_classes_and_becomes_another_version_the_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import joblib
    import pandas as pd
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, kinds = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, names[kinds])
    joblib.dump(model, tmp_path / "iris.joblib")
    pd.DataFrame(features[::10], columns=list("abcd")).to_csv(tmp_path / "rows.csv", index=False)
    target = tmp_path / "models" / "iris"
    arguments = ["import", str(tmp_path / "iris.joblib"), "--example", str(tmp_path / "rows.csv")]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*arguments, "--to", str(target)]) == 0
    said, bar = capsys.readouterr()
    assert "iris 1: Pipeline, 15 rows differ from scikit-learn" in said
    for step in ("converting iris.joblib", "loading", "comparing"):
        assert step in bar
    assert (target / "labels.txt").read_text().split() == names.tolist()
    sample = json.loads((target / "samples" / "imported.json").read_text())
    assert sample["outputs"]["scores"] == pytest.approx(model.predict_proba(features[:30:10]), abs=1e-6)
    data = pd.DataFrame(features, columns=list("abcd")).assign(target=names[kinds])
    data.to_csv(tmp_path / "data.csv", index=False)
    # The intervals of the metrics, which take seconds, are no matter here.
    monkeypatch.setattr("inferpool.release.evaluate.metrics.RESAMPLES", 2)
    assert cli.main(["evaluate", str(target), "--data", str(tmp_path / "data.csv")]) == 0
    right = model.score(features, names[kinds])
    assert re.search(rf"^accuracy +{right:.4g} ", capsys.readouterr().out, re.MULTILINE)
    card = (target / "README.md").read_text()
    assert (
        f"that of Inferpool, with Python {platform.python_version()}, joblib {joblib.__version__}, " in card
    )
    # In an environment of its own, although the packages are here; this uv makes none.
    uv = tmp_path / "uv"
    uv.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'[ $1 = run ] || exit 0\nshift 2\nexec {sys.executable} "$@"\n'
    )
    uv.chmod(0o755)
    monkeypatch.setattr("inferpool.release.build._find_uv", lambda: str(uv))
    assert cli.main([*arguments, "--to", str(target), "--environment", "own"]) == 0
    assert (target / "2" / "model.onnx").read_bytes() == (target / "1" / "model.onnx").read_bytes()
    synced, run = (tmp_path / "asked").read_text().splitlines()
    assert re.fullmatch(r"sync --script .*scikit_learn\.py", synced)
    assert re.match(r"run --script .*scikit_learn\.py .*iris\.joblib", run)
    assert "this import needs an environment of its own. uv installs that now" in capsys.readouterr().err


def test_answers_that_differ_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pandas as pd
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    source = np.random.default_rng(0)
    frame = pd.DataFrame({
        "area": source.uniform(20, 200, 60), "city": source.choice(["Bern", "Basel"], 60),
    })  # fmt: skip
    prices = frame.area * 3 + (frame.city == "Bern") * 50
    columns = make_column_transformer((StandardScaler(), ["area"]), (OneHotEncoder(), ["city"]))
    (tmp_path / "price.pkl").write_bytes(pickle.dumps(make_pipeline(columns, Ridge()).fit(frame, prices)))
    frame[:8].to_csv(tmp_path / "rows.csv", index=False)
    arguments = ["import", str(tmp_path / "price.pkl"), "--example", str(tmp_path / "rows.csv")]
    target = tmp_path / "price"
    assert cli.main([*arguments, "--to", str(target), "--tolerance", "1e-9"]) == 1
    assert 'output "prediction" differs from scikit-learn' in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "problem", "status"),
    [
        ("model.dat", b"", "--from says what it is", 2),
        ("model.pkl", b"no pickle", "cannot be converted", 1),
    ],
)
def test_what_cannot_be_imported(
    name: str, content: bytes, problem: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "rows.csv").write_text("a\n1\n")
    arguments = [str(tmp_path / name), "--example", str(tmp_path / "rows.csv"), "--to", str(tmp_path / "m")]
    assert cli.main(["import", *arguments]) == status
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("suffix", "environment", "problem"),
    [
        (".pkl", "own", r"needs an environment of its own; .*was not found: run .*'inferpool\[build\]'"),
        (".cbm", "here", "needs catboost>=1.2.8, not installed here: .* --environment own"),
    ],
)
def test_an_environment_that_cannot_be_had(
    suffix: str,
    environment: str,
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inferpool.release.build._find_uv", lambda: None)
    source = tmp_path / f"model{suffix}"
    source.touch()
    (tmp_path / "rows.csv").write_text("a\n1\n")
    arguments = [str(source), "--example", str(tmp_path / "rows.csv"), "--to", str(tmp_path / "m")]
    assert cli.main(["import", *arguments, "--environment", environment]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_a_cache_is_for_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pkl").write_bytes(b"")
    arguments = [str(tmp_path / "model.pkl"), "--cache", "--example", "rows.csv", "--to", str(tmp_path / "m")]
    assert cli.main(["import", *arguments]) == 2
    assert "--cache is for folders of Hugging Face; model.pkl is none" in capsys.readouterr().err


def test_a_pickle_of_another_kind_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="list is no classifier"):
        script("tabular", monkeypatch).convert_estimator([1, 2], tmp_path / "rows.npz", tmp_path)
