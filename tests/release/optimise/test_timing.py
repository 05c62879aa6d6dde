"""Forms are timed in shared rounds; a form is faster only if it is in most of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from inferpool.errors import LoadError
from inferpool.release.optimise import timing
from inferpool.release.optimise.timing import (
    ROUNDS,
    SIZES,
    SLOW_ROUNDS,
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
    assert dict(found["same"].run_ms) == pytest.approx(dict.fromkeys(SIZES, 100))
    assert found["same"].gains == pytest.approx([1.0] * ROUNDS)
    with pytest.raises(LoadError, match="cannot be timed"):
        time_forms({"original": broken}, "original", batches, 1)


def test_a_form_that_cannot_win_is_timed_in_a_few_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.onnx"
    write_network(file)
    seconds: dict[int, float] = {}
    # By the order in which the models are run first.
    monkeypatch.setattr(
        timing, "_run_s", lambda model, *_: seconds.setdefault(id(model), 0.1 * 3 ** len(seconds))
    )
    batches = batches_of([{"x": np.zeros((1, 64), np.float32)}])
    found, _ = time_forms(dict.fromkeys(("original", "slow"), file), "original", batches, 1)
    assert found["original"].gains == pytest.approx([1.0] * ROUNDS)
    assert found["slow"].gains == pytest.approx([1 / 3] * SLOW_ROUNDS)


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
