"""Drift: profiles of data, counts of what is served, and the distances between the two."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from inferpool.drift.build import ProfileBuilder
from inferpool.drift.config import DriftConfig
from inferpool.drift.counts import WINDOW, WindowCounts
from inferpool.drift.distance import distances
from inferpool.drift.fields import FieldFacts, field_values
from inferpool.drift.profile_file import PROFILE_FILE, Profile, check_series, profile_bytes, read_profile
from inferpool.errors import ConfigError
from inferpool.observe.families import DRIFT, HIDDEN
from inferpool.privacy.noise import CountNoise
from inferpool.tensors import Array

LITTLE_NOISE = CountNoise(100.0, 1, random.Random(1).randrange)


def strings(*texts: str) -> Array:
    array = np.empty(len(texts), np.object_)
    array[:] = texts
    return array


def profile_of(**values: Array) -> Profile:
    builder = ProfileBuilder()
    builder.add(values, len(next(iter(values.values()))))
    profile, left_out = builder.profile("data.csv")
    builder.close()
    assert not left_out
    return profile


def counted(profile: Profile, **values: Array) -> dict[str, list[int]]:
    counts = WindowCounts(profile, 10.0, LITTLE_NOISE)
    assert counts.add(5.0, values) is None
    closed = counts.close_at(11.0)
    assert closed is not None
    return dict(closed.counts)


def test_the_distances_are_those_of_their_definitions() -> None:
    found = distances([0.5, 0.5, 0.0], [30, 10, 0], ordered=True)
    assert found.psi == pytest.approx(0.25 * math.log(0.75 / 0.5) - 0.25 * math.log(0.25 / 0.5))
    assert found.ks == pytest.approx(0.25)
    m = (0.625, 0.375)
    js = (0.5 * math.log2(0.5 / m[0]) + 0.5 * math.log2(0.5 / m[1])
          + 0.75 * math.log2(0.75 / m[0]) + 0.25 * math.log2(0.25 / m[1])) / 2  # fmt: skip
    assert found.js == pytest.approx(math.sqrt(js))
    assert distances([0.5, 0.5], [10, 10], ordered=False) == (0.0, None, 0.0)
    assert distances([1.0, 0.0], [-1, 5], ordered=False).js == pytest.approx(1.0)
    assert distances([1.0, 0.0], [0, 5], ordered=True).ks == 1.0, "all values are missing"


def test_data_like_the_reference_is_near_and_shifted_data_is_far() -> None:
    rng = np.random.default_rng(0)
    profile = profile_of(x=rng.normal(size=5000))
    [field] = profile.fields
    near = distances(field.shares, counted(profile, x=rng.normal(size=5000))["x"], ordered=True)
    far = distances(field.shares, counted(profile, x=rng.normal(1.0, size=5000))["x"], ordered=True)
    assert near.psi < 0.02 < 0.25 < far.psi
    assert near.ks is not None
    assert far.ks is not None
    # The exact distance of two normal distributions one deviation apart is 0.383.
    assert near.ks < 0.03 < 0.3 < far.ks <= 0.4


def test_few_different_integers_and_strings_are_categories() -> None:
    profile = profile_of(
        sex=np.array([1.0, 2.0, 2.0] * 20), town=strings(*["Ulm", "Bonn"] * 29, "Rare", "Ulm")
    )
    [few] = profile_of(few=np.array([0.25, 0.5] * 20)).fields
    assert few.kind == "number", "the next run may round otherwise"
    by_name = profile.by_name()
    assert by_name["sex"].values == ("2", "1")
    assert by_name["town"].values == ("Ulm", "Bonn"), "a value of one row could name a person"
    counts = counted(profile, sex=np.array([1.0, 3.0, np.nan]), town=strings("Bonn", "Kiel"))
    assert counts == {"sex": [0, 1, 2], "town": [0, 1, 1]}


def test_missing_numbers_and_equal_ones_have_their_bins() -> None:
    numbers = np.concatenate([np.zeros(900), np.arange(100.0)])
    numbers[-10:] = np.nan
    [field] = profile_of(x=numbers).fields
    assert field.kind == "number"
    assert sum(field.shares) == pytest.approx(1.0)
    assert field.shares[-1] == pytest.approx(0.01)
    assert field.shares[0] == pytest.approx(0.9, abs=0.02)


def test_a_window_ends_once_and_one_row_changes_one_count_of_a_field() -> None:
    profile = profile_of(x=np.arange(1000.0))
    rows = np.arange(0.0, 1000.0, 10)
    one, other = counted(profile, x=rows)["x"], counted(profile, x=rows[1:])["x"]
    assert sorted(abs(a - b) for a, b in zip(one, other, strict=True))[-2:] == [0, 1]
    counts = WindowCounts(profile, 10.0, LITTLE_NOISE)
    counts.add(5.0, {"x": rows})
    closed = counts.add(12.0, {"x": rows[:50]})
    assert closed is not None
    assert (closed.number, sum(closed.counts["x"])) == (0, 100)
    assert counts.close_at(13.0) is None
    later = counts.close_at(47.0)
    assert later is not None
    assert (later.number, sum(later.counts["x"])) == (1, 50)
    assert counts.close_at(99.0) is None, "a window without rows tells nothing"


def test_fields_are_named_by_what_a_row_has() -> None:
    facts = FieldFacts(pixels="picture", labels=("logits", ["no", "yes"]))
    inputs = {
        "age": np.array([[3], [4]]),
        "features": np.array([[1.0, np.inf], [3.0, 4.0]]),
        "vector": np.ones((2, 100)),
        "picture": np.stack([np.zeros((3, 4, 4)), np.ones((3, 4, 4))]),
    }
    found = field_values(facts, [inputs], {"logits": np.array([[0.1, 0.9], [0.8, np.nan]])})
    assert found["inputs.age"].tolist() == [3, 4]
    assert math.isnan(found["inputs.features[1]"][0])
    assert found["inputs.vector.std"].tolist() == [0, 0]
    assert found["inputs.picture.channel2.mean"].tolist() == [0, 1]
    assert found["outputs.logits.label"].tolist() == ["yes", "no"]
    assert found["outputs.logits.top"].tolist() == [0.9, 0.8]
    text = FieldFacts(text="text", ids="ids", unknown=7)
    runs = [{"ids": np.array([[1, 7]])}, {"ids": np.array([[1, 2, 7, 7], [1, 2, 3, 4]])}]
    found = field_values(text, runs, {})
    assert found["inputs.text.tokens"].tolist() == [2, 4, 4]
    assert found["inputs.text.unknown"].tolist() == [0.5, 0.5, 0.0]


def test_a_profile_is_read_as_it_was_written_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    profile = profile_of(x=np.arange(1000.0))
    (tmp_path / PROFILE_FILE).write_bytes(profile_bytes(profile))
    assert read_profile(tmp_path) == profile
    assert read_profile(tmp_path / "missing") is None
    check_series(("x",), profile)
    with pytest.raises(ConfigError, match='no field "y"'):
        check_series(("y",), profile)
    for wrong in (
        '{"rows": 1}',
        "[",
        '{"rows": 1, "fields": [{"name": "x", "kind": "number", "shares": [0.1]}]}',
    ):
        (tmp_path / PROFILE_FILE).write_text(wrong)
        with pytest.raises(ConfigError, match=PROFILE_FILE):
            read_profile(tmp_path)


def test_a_profile_has_outputs_first_if_there_are_too_many_fields() -> None:
    builder = ProfileBuilder()
    names = [f"inputs.x[{at}]" for at in range(40)]
    builder.add({**{name: np.arange(30.0) for name in names}, "outputs.y": np.arange(30.0)}, 30)
    profile, left_out = builder.profile("d")
    builder.close()
    assert profile.fields[0].name == "outputs.y"
    assert left_out == names[31:]


def test_the_numbers_of_a_series_have_room_for_two_windows() -> None:
    assert HIDDEN[DRIFT] == 2 * WINDOW
    assert DriftConfig().enabled
