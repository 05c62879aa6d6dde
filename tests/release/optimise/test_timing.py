"""Forms are timed in shared rounds; a form is faster only if it is in most of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.errors import LoadError
from inferpool.release.optimise import timing
from inferpool.release.optimise.timing import (
    LEAST_ROUNDS,
    ROUNDS,
    SIZES,
    Timing,
    batches_of,
    time_forms,
)

from tests.release.optimise.test_candidates import write_network


def test_a_form_has_times_for_each_size_and_a_gain_for_each_round(tmp_path: Path) -> None:
    file, broken = tmp_path / "model.onnx", tmp_path / "broken.onnx"
    write_network(file)
    broken.write_bytes(b"no model")
    batches = batches_of([{"x": np.arange(3 * 64, dtype=np.float32).reshape(3, 64)}])
    assert [len(batches[size]["x"]) for size in SIZES] == list(SIZES)
    assert (batches[64]["x"][3] == batches[64]["x"][0]).all()
    # A clock of its own: each look at it takes a tenth of a second.
    looks = iter(range(10**9))
    found, failed = time_forms(
        {"original": file, "same": file, "broken": broken}, "original", batches, 1, lambda: next(looks) / 10
    )
    assert list(failed) == ["broken"]
    assert dict(found["same"].p50_ms) == pytest.approx(dict.fromkeys(SIZES, 100))
    assert found["same"].rows_per_s == pytest.approx({size: 10 * size for size in SIZES})
    assert found["same"].gains == pytest.approx([1.0] * LEAST_ROUNDS)
    with pytest.raises(LoadError, match="cannot be timed"):
        time_forms({"original": broken}, "original", batches, 1)


def time_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: dict[str, dict[int, list[float]]]
) -> tuple[dict[str, Timing], dict[str, str], list[tuple[str, int]], int]:
    """Return the timings of forms that take these seconds in their rounds, the failures, all runs, and what
    was told; a run of a size without seconds fails.
    """
    runs: list[tuple[str, int]] = []
    rounds = {name: {size: iter(each) for size, each in own.items()} for name, own in seconds.items()}

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, batch: dict[str, Any]) -> None:
            size = len(batch["x"])
            runs.append((self.name, size))
            if size not in seconds[self.name]:
                raise RuntimeError("no memory is left")

    monkeypatch.setattr(OnnxBackend, "load", lambda _, path, options: Model(path.name))
    monkeypatch.setattr(
        timing, "_run_s", lambda model, batch, clock: [next(rounds[model.name][len(batch["x"])])]
    )
    told: list[int] = []
    batches = batches_of([{"x": np.zeros((1, 64), np.float32)}])
    found, failed = time_forms(
        {name: tmp_path / name for name in seconds}, "original", batches, 1, done=told.append
    )
    return found, failed, runs, sum(told)


@pytest.mark.parametrize(
    ("gains", "rounds"),
    [
        ([0.9] * 9, 3),
        ([1.01] * 9, 5),
        ([1.2, 0.9] * 4 + [1.2], 6),
        ([1.2] * 7 + [0.9, 0.9], 9),
        ([1.2, 1.2, 1.2, 1.2, 1.01, 1.01, 1.01, 1.01, 1.2], 9),
    ],
)
def test_a_form_leaves_when_no_other_round_could_make_it_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: list[float], rounds: int
) -> None:
    seconds = {
        "original": {size: [1.0] * ROUNDS for size in SIZES},
        "form": {size: [1 / gain for gain in gains] for size in SIZES},
    }
    found, failed, runs, told = time_by(monkeypatch, tmp_path, seconds)
    assert found["form"].gains == pytest.approx(gains[:rounds])
    assert found["form"].is_faster is Timing({}, gains).is_faster
    assert len(found["original"].gains) == rounds  # without forms to compare it is timed no more
    assert sorted(runs) == sorted(
        (name, size) for name in seconds for size in SIZES
    )  # one run each to warm up
    assert told == len(SIZES) * 2 * ROUNDS
    assert failed == {}


def test_the_largest_batch_is_spared_a_form_that_is_far_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {
        "original": {size: [1.0] * ROUNDS for size in SIZES},
        "far": {1: [4.1] * ROUNDS, 8: [10.0] * ROUNDS, 64: []},
        "one": {1: [0.5] * ROUNDS, 8: [10.0] * ROUNDS, 64: [0.1] * ROUNDS},
        "large": {1: [1.0] * ROUNDS, 8: [1.0] * ROUNDS},
        "once": {1: [4.1] + [1.5] * 8, 8: [4.1] + [1.5] * 8, 64: [1.5] * ROUNDS},
    }
    found, failed, runs, told = time_by(monkeypatch, tmp_path, seconds)
    assert found["far"].p50_ms == pytest.approx({1: 4100, 8: 10_000})
    assert found["far"].gains == pytest.approx([41**-0.5] * LEAST_ROUNDS)
    assert ("far", 64) not in runs
    assert found["one"].is_faster
    assert failed == {"large": "no memory is left"}
    assert list(found) == ["original", "far", "one", "once"]
    assert told == len(SIZES) * 5 * ROUNDS
    assert found["once"].p50_ms == pytest.approx({1: 1500, 8: 1500, 64: 1500})


@pytest.mark.parametrize(
    ("gains", "faster"),
    [
        ([1.2] * 9, True),
        ([1.04] * 9, False),
        ([1.2] * 6 + [0.9] * 3, False),
        ([1.2] * 7 + [0.9] * 2, True),
        ([0.5] * 9, False),
    ],
)
def test_what_is_faster(gains: list[float], faster: bool) -> None:
    assert Timing({1: 1.0}, gains).is_faster is faster


def test_a_time_is_the_median_of_all_runs_and_a_gain_is_of_the_quickest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = {"original": [0.1, 0.3, 0.4], "form": [0.2, 0.2, 0.2]}
    monkeypatch.setattr(OnnxBackend, "load", lambda _, path, options: Named(path.name))
    monkeypatch.setattr(timing, "_run_s", lambda model, batch, clock: took[model.name])
    files = {name: tmp_path / name for name in took}
    found, _ = time_forms(files, "original", batches_of([{"x": np.zeros((1, 64), np.float32)}]), 1)
    assert found["original"].p50_ms == pytest.approx(dict.fromkeys(SIZES, 300))
    assert found["form"].p50_ms == pytest.approx(dict.fromkeys(SIZES, 200))
    assert found["form"].gain == pytest.approx(0.5)


class Named:
    """A model that only has a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, batch: object) -> None:
        pass
