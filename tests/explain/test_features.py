"""How inputs are divided into features, and what replaces these."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.explain import baselines
from inferpool.explain.features import FIXED, VariedInput, blocks, patches, perturbed_rows, usual_side
from inferpool.tensors import bf16_to_fp32, fp32_to_bf16


@given(elements=st.integers(1, 2000), most=st.integers(1, 300))
def test_blocks_are_neighbours_of_one_size(elements: int, most: int) -> None:
    numbers = blocks(elements, most)
    sizes = np.bincount(numbers)
    assert len(numbers) == elements
    assert len(sizes) <= most
    assert (np.diff(numbers) >= 0).all()
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0]


@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_the_usual_patches_are_at_most_64_squares(height: int, width: int) -> None:
    side = usual_side(height, width)
    numbers = patches(height, width, side)
    assert numbers.shape == (height, width)
    assert len(np.unique(numbers)) == numbers.max() + 1 <= 64
    assert np.bincount(numbers.reshape(-1)).max() <= side**2


@given(data=st.data(), features=st.integers(1, 5), count=st.integers(1, 4), baselines=st.integers(1, 3))
def test_what_a_coalition_leaves_out_comes_from_the_baseline(
    data: st.DataObject, features: int, count: int, baselines: int
) -> None:
    numbers = np.array(data.draw(st.lists(st.integers(FIXED, features - 1), min_size=6, max_size=6)))
    masks = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=features, max_size=features), min_size=count,
                           max_size=count))
    )  # fmt: skip
    own = np.arange(6, dtype=np.float32)
    instead = -1 - np.arange(6 * baselines, dtype=np.float32).reshape(baselines, 6)
    rows = perturbed_rows({"x": VariedInput(own, instead, numbers)}, masks)["x"]
    assert (rows.dtype, rows.shape) == (own.dtype, (count * baselines, 6))
    for row, found in enumerate(rows):
        mask, baseline = masks[row // baselines], instead[row % baselines]
        kept = [number == FIXED or mask[number] for number in numbers]
        assert found.tolist() == np.where(kept, own, baseline).tolist()


def test_the_mean_of_rows_has_their_datatype() -> None:
    integers = np.array([[1, 2], [2, 2]], np.int64)
    assert baselines.mean_row(integers, False).tolist() == [[2, 2]]
    words = np.array([["a"], ["b"]], object)
    assert baselines.mean_row(words, False).tolist() == [["a"]]
    bits = fp32_to_bf16(np.array([[1.0], [2.0]], np.float32))
    assert bf16_to_fp32(baselines.mean_row(bits, True)).tolist() == [[1.5]]
    assert baselines.zeros(np.array(["word"], object)).tolist() == [[""]]


@pytest.mark.parametrize("layout", ["CHW", "HWC", "HW"])
def test_pictures_without_shapes_keep_their_colours(layout: str) -> None:
    sizes = {"C": 3, "H": 16, "W": 24}
    picture = np.random.default_rng(0).random([sizes[axis] for axis in layout]).astype(np.float32)
    axes = (layout.index("H"), layout.index("W"))
    for baseline in (
        baselines.mean_colour(picture, layout, False),
        baselines.blurred(picture, layout, False),
    ):
        assert (baseline.shape, baseline.dtype) == ((1, *picture.shape), picture.dtype)
        np.testing.assert_allclose(baseline[0].mean(axis=axes), picture.mean(axis=axes), atol=0.03)
        assert baseline[0].std(axis=axes).max() < 0.1
    plain = np.full(picture.shape, 0.25, np.float32)
    np.testing.assert_allclose(baselines.blurred(plain, layout, False)[0], plain, rtol=1e-6)
