"""The forecast: a regression that never sees the future, judged against the last value, and served."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT, Serve
from tests.models.built import build
from tests.server import Server

MODEL = ROOT / "models/forecast"


def load_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_forecast", MODEL / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_module()


def write_csv(path: Path, closes: np.ndarray, head: str = "Date,Open,Close") -> Path:
    days = (date(2020, 1, 1) + timedelta(days=index) for index in range(len(closes)))
    lines = (f"{day},1,{close:.2f}" for day, close in zip(days, closes, strict=True))
    path.write_text("\n".join((head, *lines)) + "\n")
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the folder forecast alone, not built."""
    target = tmp_path / "models" / "forecast"
    target.mkdir(parents=True)
    for name in ("build.py", "model.toml"):
        shutil.copy(MODEL / name, target)
    return target.parent


def test_the_script_builds_the_committed_model(repository: Path) -> None:
    run = build(repository, "forecast")
    assert run.returncode == 0, run.stderr
    for name in ("1/evaluation.json", "samples/last.json"):
        mine, theirs = (json.loads((at / name).read_text()) for at in (repository / "forecast", MODEL))
        assert mine.keys() == theirs.keys()
        for key in mine:
            if isinstance(mine[key], list):
                np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-3)
            elif isinstance(mine[key], dict):
                ((_, rows),), ((_, expected),) = mine[key].items(), theirs[key].items()
                np.testing.assert_allclose(rows, expected, rtol=1e-5)
            else:
                assert mine[key] == theirs[key]


def test_the_table_in_the_card_is_that_of_the_back_test() -> None:
    facts = json.loads((MODEL / "1/evaluation.json").read_text())
    shown = re.findall(
        r"^  \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (MODEL / "README.md").read_text(), re.MULTILINE
    )
    pairs = zip(facts["mean_absolute_error"], facts["of_the_last_value"], strict=True)
    assert shown == [
        (str(ahead), f"{error:.4f}", f"{baseline:.4f}", f"{error / baseline:.3f}")
        for ahead, (error, baseline) in enumerate(pairs, start=1)
    ]


def test_twenty_closes_give_the_next_five(bundled: Server) -> None:
    """The graph computes the regression, as plain arithmetic does, for prices of any size."""
    closes = script.synthesise(0)
    windows, futures = script.to_windows(closes, 20, 5)
    expected = script.predict(script.fit(windows, futures), windows[-3:])
    for size in (1, 1000, 1e-3):
        body = {"inputs": (size * windows[-3:]).tolist()}
        answer = bundled.post("/predict/forecast", json=body).json()
        np.testing.assert_allclose(answer["outputs"]["forecast"], size * expected, rtol=1e-5)


def test_another_series_and_other_lengths_are_learned(repository: Path, tmp_path: Path, serve: Serve) -> None:
    """The model forecasts a price that always doubles exactly, one step and several steps ahead."""
    closes = 100 * 1.01 ** np.arange(120)
    file = write_csv(tmp_path / "mine.csv", closes)
    run = build(repository, "forecast", "--csv", file, "--window", 3, "--horizon", 2)
    assert run.returncode == 0, run.stderr
    assert "series: mine.csv; 120 closes" in run.stdout
    answer = serve(repository).post("/predict", json={"inputs": [[100, 101, 102.01]]}).json()
    np.testing.assert_allclose(answer["outputs"]["forecast"], [[103.0301, 104.0604]], rtol=1e-3)


def test_the_output_says_if_the_last_value_is_the_better_forecast(repository: Path, tmp_path: Path) -> None:
    """On a random walk a regression learns only noise; a model that learned from few prices is refused."""
    walk = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, 1500)))
    run = build(repository, "forecast", "--csv", write_csv(tmp_path / "walk.csv", walk))
    assert run.returncode == 0, run.stderr
    assert "it does not beat the last value 1, 2, 3, 4, 5 day(s) ahead" in run.stdout
    shutil.rmtree(repository / "forecast/1")
    run = build(repository, "forecast", "--csv", write_csv(tmp_path / "short.csv", walk[:250]))
    assert run.returncode == 1
    assert "not written: the card states at most 1.05 times the last value's" in run.stderr
    assert not (repository / "forecast/1").exists()
    run = build(repository, "forecast", "--csv", write_csv(tmp_path / "shorter.csv", walk[:249]))
    assert run.returncode == 1
    assert run.stderr == "not built: 249 closes, and 250 are needed to judge a forecast\n"


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 4), st.integers(0, 30))
def test_the_back_test_never_sees_the_future(seed: int, window: int, horizon: int, day: int) -> None:
    """Changed prices after a day do not change the forecasts of that day and earlier days."""
    draw = np.random.default_rng(seed)
    closes = 100 * np.exp(np.cumsum(draw.normal(0, 0.01, 150)))
    first = len(closes) - window - horizon + 1 - int(0.2 * (len(closes) - window - horizon + 1))
    day = min(day, len(closes) - window - horizon - first)
    changed = closes.copy()
    changed[first + day + window :] *= draw.uniform(0.5, 2, len(closes) - first - day - window)
    before, after = (forecasts(series, window, horizon)[: day + 1] for series in (closes, changed))
    np.testing.assert_array_equal(before, after)


def forecasts(closes: np.ndarray, window: int, horizon: int) -> np.ndarray:
    """Return the forecasts of the back-test, day by day; the back-test itself returns their errors only."""
    made: list[np.ndarray] = []
    predict = script.predict

    def recorded(*arguments: Any) -> np.ndarray:
        made.append(predict(*arguments))
        return made[-1]

    with mock.patch.multiple(script, predict=recorded, tqdm=lambda steps, **_: steps):
        script.back_test(closes, window, horizon)
    return np.concatenate(made)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("day,price\n1,2\n", "expected columns date and close; there are day, price"),
        ("", "expected columns date and close"),
        ("date,close\n2024-01-02,1\n2024-01-01,1\n", ":3: 2024-01-01 comes after 2024-01-02"),
        ("date,close\n2024-01-01,1\n2024-01-01,1\n", "comes after"),
        ("date,close\n2024-01-01,-1\n", ":2: close is '-1'"),
        ("date,close\n2024-01-01,nan\n", "expected a price above 0"),
        ("date,close\n2024-01-01\n", "expected a price above 0"),
        ("date,close\n2024-01-01,one\n", "line 2: could not convert"),
        ("date,close\n01/02/2024,1\n", "line 2: Invalid isoformat"),
    ],
)
def test_a_damaged_csv_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SystemExit, match=re.escape(words)):
        script.read_closes(tmp_path / "a.csv")
