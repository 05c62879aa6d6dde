"""Several pictures in one request: their rows, their errors, and what they may take together."""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np
import pytest
from inferpool.allowance import UNLIMITED
from inferpool.codecs.base64_files import read_base64
from inferpool.codecs.image import MOST_PICTURES, PICTURES_TOGETHER
from inferpool.errors import BodyTooLarge, InferpoolError, InvalidInput, MalformedBody
from inferpool.tensors import ANY
from PIL import Image

from tests.codecs.picture_memory import counting_allowance
from tests.codecs.pictures import codec, file_of, noise, raw_codec

FILES = [
    file_of(Image.fromarray(noise(6, 5, seed=seed)), kind) for seed, kind in enumerate(("PNG", "GIF", "TIFF"))
]


def test_each_picture_is_a_row_as_it_is_alone() -> None:
    made = codec(ANY, 3, 6, 5)
    rows = made.decode_rows(FILES, len(FILES))["x"]
    np.testing.assert_array_equal(rows, np.concatenate([made.decode(file)["x"] for file in FILES]))
    pixels = made.without_normalisation().decode_rows(FILES, len(FILES))["x"]
    assert pixels.shape == (3, 6, 5, 3)
    assert pixels.dtype == np.uint8


def test_memory_is_taken_for_one_picture_at_a_time_and_given_back() -> None:
    made, (allowance, budget) = codec(ANY, 3, 6, 5), counting_allowance()
    made.decode_rows(FILES * 100, 300, allowance)
    assert budget.decoded == 300 * 3 * 6 * 5 * 4


@pytest.mark.parametrize(
    ("files", "error", "text"),
    [
        ([*FILES, b"nothing"], MalformedBody, "picture 3: the body is not a picture"),
        ([*FILES, b""], MalformedBody, "picture 3: the body is empty"),
        ([FILES[0]] * (MOST_PICTURES + 1), BodyTooLarge, f"at most {MOST_PICTURES}"),
        ([FILES[0]] * (PICTURES_TOGETHER + 1), BodyTooLarge, f"picture {PICTURES_TOGETHER}: .* may have 120"),
    ],
)
def test_the_picture_at_fault_is_named(files: list[bytes], error: type[InferpoolError], text: str) -> None:
    with pytest.raises(error, match=text):
        raw_codec(6, 5, max_pixels=30).decode_rows(files, len(files))


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text,
        lambda text: f"data:image/png;base64,{text}",
        lambda text: f"DATA:image/x-any+thing;BASE64,{text}",
        lambda text: "\r\n".join(text[at : at + 60] for at in range(0, len(text), 60)),
    ],
)
def test_base64_and_data_urls(write: Callable[[str], str]) -> None:
    texts = [write(base64.b64encode(file).decode()) for file in FILES]
    assert [*read_base64("x", texts, UNLIMITED)] == FILES


@pytest.mark.parametrize(
    "text", ["?", "AAA", "A===", "data:text/plain,hello", "https://host/a.png", "é" * 40]
)
def test_what_is_no_base64_is_named(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"at \[1\]") as refused:
        [*read_base64("x", ["", text], UNLIMITED)]
    assert refused.value.members == {"tensor": "x", "index": [1]}
    assert ("not fetched" in refused.value.detail) == text.startswith("https")
