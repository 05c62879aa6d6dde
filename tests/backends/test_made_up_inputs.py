"""Made-up inputs take a bounded amount of memory, and try sizes that pictures have."""

from __future__ import annotations

from inferpool.backends.made_up_inputs import made_up_pairs, made_up_rows
from inferpool.tensors import TensorSpec

MOST_BYTES = 64 << 20


def test_free_dimensions_of_a_video_stay_small() -> None:
    """Rows of 224 in each of five dimensions would take 150 GB."""
    video = [TensorSpec("x", "FP32", (-1, -1, -1, -1, -1))]
    tried = list(made_up_rows(video, 8))
    pairs = [each for pair in made_up_pairs(video) for each in pair]
    assert max(each["x"].nbytes for each in tried + pairs) <= MOST_BYTES
    assert any(each["x"].shape[1:] == (3, 3, 3, 3) for each in tried)
    assert any(each["x"].shape[1:] == (3, 32, 32, 32) for each in tried)


def test_channels_lie_first_or_last() -> None:
    tried = {each["x"].shape[1:] for each in made_up_rows([TensorSpec("x", "FP32", (-1, -1, -1, -1))], 8)}
    assert {(3, 224, 224), (224, 224, 3), (1, 32, 32), (16, 16, 16)} <= tried


def test_large_fixed_rows_are_few() -> None:
    (few,) = made_up_rows([TensorSpec("x", "FP32", (-1, 3, 1080, 1920))], 8)
    assert len(few["x"]) == 2
    assert not list(made_up_rows([TensorSpec("x", "FP32", (-1, 100_000, 100_000))], 8))
