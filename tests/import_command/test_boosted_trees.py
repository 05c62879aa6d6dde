"""Models of XGBoost and LightGBM, whose packages are small, are imported as files and in pipelines.

One goes through the command. The scripts of the others run in this process, because the packages take seconds
to import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.record import needs_to_run

needs_to_run("frameworks", whole_module=True)

import joblib
import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from inferpool import cli
from sklearn.datasets import load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.import_command.scripts import difference, script


def houses() -> tuple[pd.DataFrame, pd.Series]:
    """Houses with a size that is missing here and there, and a city and a zone, which are categories."""
    source = np.random.default_rng(0)
    frame = pd.DataFrame({
        "size": source.uniform(20, 200, 120),
        "city": pd.Categorical(source.choice(["Basel", "Bern", "Chur"], 120)),
        "zone": pd.Categorical(source.integers(3, 7, 120)),
    })  # fmt: skip
    prices = frame["size"] + (frame.city == "Bern") * 90 + frame.zone.astype(int) * 20
    frame.loc[::9, "size"] = np.nan
    frame.loc[::11, "city"] = np.nan
    return frame, prices


def as_example(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """The arrays that `--example` makes of a CSV with the rows of `frame`."""
    cities = np.array(["" if city is np.nan else city for city in frame.city], np.str_)
    return {"size": frame["size"].to_numpy(), "city": cities, "zone": frame.zone.to_numpy(float)}


def test_strings_categories_and_missing_values_go_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, prices = houses()
    xgboost.XGBRegressor(n_estimators=6, enable_categorical=True).fit(frame, prices).save_model(
        tmp_path / "m.ubj"
    )
    frame[["zone", "size", "city"]].to_csv(tmp_path / "rows.csv", index=False)  # in another order
    target = tmp_path / "price"
    arguments = [str(tmp_path / "m.ubj"), "--example", str(tmp_path / "rows.csv"), "--to", str(target)]
    assert cli.main(["import", *arguments]) == 0
    said = capsys.readouterr().out
    assert "120 rows differ from XGBoost" in said
    assert "batching is off" not in said
    sample = json.loads((target / "samples" / "imported.json").read_text())
    assert list(sample["inputs"]) == ["size", "city", "zone"]
    assert sample["inputs"]["city"][0] == [""]
    assert sample["inputs"]["size"][0] == [None]
    assert "`city`, text [rows, 1]" in (target / "README.md").read_text()


def test_lightgbm_keeps_categories_and_missing_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, prices = houses()
    model = lightgbm.LGBMRegressor(n_estimators=6, min_data_per_group=3, cat_smooth=1, verbose=-1)
    model.fit(frame, prices).booster_.save_model(tmp_path / "price.txt")
    np.savez(tmp_path / "example.npz", **as_example(frame))  # type: ignore[arg-type]
    script("lightgbm_model", monkeypatch).main(tmp_path / "price.txt", tmp_path / "example.npz", tmp_path)
    assert difference(tmp_path) < 1e-4
    with np.load(tmp_path / "imported.npz") as loaded:
        assert np.ptp(loaded["out:prediction"]) > 50
    np.savez(tmp_path / "example.npz", size=frame["size"], city=as_example(frame)["city"])
    with pytest.raises(SystemExit, match=r"takes 3 columns \(size, city, zone\); the example has 2"):
        script("lightgbm_model", monkeypatch).main(tmp_path / "price.txt", tmp_path / "example.npz", tmp_path)


def test_a_pickled_pipeline_is_converted_by_the_framework_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, kinds = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[kinds]
    model = make_pipeline(StandardScaler(), lightgbm.LGBMClassifier(n_estimators=6, verbose=-1))
    source = tmp_path / "iris.joblib"
    joblib.dump(model.fit(features, names), source, compress=3)
    np.savez(tmp_path / "example.npz", x=features)
    convert = script("lightgbm_model", monkeypatch).main
    monkeypatch.delitem(sys.modules, "xgboost")  # the pickle needs it no more than another program would
    with pytest.raises(SystemExit, match="import it with --from lightgbm"):
        script("tabular", monkeypatch).load_pickle(source, "scikit-learn")
    convert(source, tmp_path / "example.npz", tmp_path)
    assert difference(tmp_path) < 1e-5
    about = json.loads((tmp_path / "imported.json").read_text())
    assert about["classes"] == ["setosa", "versicolor", "virginica"]


@pytest.mark.parametrize("classes", [2, 3])
def test_classifiers_of_xgboost_answer_a_score_for_each_class(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, kinds = load_iris(return_X_y=True)
    model = xgboost.XGBClassifier(n_estimators=6).fit(features, kinds % classes)
    model.save_model(tmp_path / "iris.json")
    np.savez(tmp_path / "example.npz", x=features)
    script("xgboost_model", monkeypatch).main(tmp_path / "iris.json", tmp_path / "example.npz", tmp_path)
    assert difference(tmp_path) < 1e-5
    with np.load(tmp_path / "imported.npz") as loaded:
        assert loaded["out:scores"].shape == (150, classes)
