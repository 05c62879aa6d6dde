"""The table `[image]` must fit the signature of the model; errors begin with the key at fault."""

from __future__ import annotations

from typing import Any

import pytest
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.errors import ConfigError
from inferpool.tensors import ANY, Signature, TensorSpec
from PIL import Image
from pydantic import ValidationError

from tests.codecs.pictures import codec, file_of

TWO_INPUTS = Signature((TensorSpec("x", "FP32", (ANY, 3, 8, 8)), TensorSpec("mask", "FP32", (ANY, 8, 8))), ())


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((ANY, 3, 8, 8), {"input": "y"}, 'image.input: no input is called "y"'),
        ((ANY, 1, 8, 8), {}, "image.mode: "),
        ((ANY, 3, 8, 8), {"layout": "HWC"}, "image.mode: "),
        ((ANY, 3, 8, 8), {"layout": "HW", "mode": "grey"}, 'image.layout: "HW" after the rows makes 3'),
        ((ANY, 8, 8), {"layout": "HW"}, 'image.layout: "HW" has no room for colours'),
        ((3, 8, 8), {}, 'image.layout: "CHW" after the rows makes 4 dimensions'),
        ((4, 3, 8, 8), {}, "image.input: a picture makes one row"),
        ((ANY, 3, 8, 8), {"size": (8, 9)}, r"image.size: \[8, 9\] does not fit"),
        ((ANY, 3, ANY, 8), {}, "image.size: must be given"),
        ((ANY, 3, ANY, ANY), {"size": (80, 90), "max_pixels": 7199}, "image.size: 80×90 is more than"),
        ((ANY, 3, 8, 8), {"mean": (0.5,)}, r"image.mean: 1 numbers for 3 channel\(s\)"),
        ((ANY, 3, 8, 8), {"std": (1.0, 0.0, 1.0)}, "image.std: must not be 0"),
        ((ANY, 3, 8, 8), {"scale": 1e38}, "image.scale: .* too large for FP32"),
    ],
)
def test_contradictions_are_refused_with_the_key(
    shape: tuple[int, ...], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        codec(*shape, **config)


@pytest.mark.parametrize("key", ["scale", "mean", "std"])
def test_integers_are_not_scaled(key: str) -> None:
    with pytest.raises(ConfigError, match=f'^image.{key}: "x" is UINT8'):
        codec(ANY, 3, 8, 8, datatype="UINT8", **{key: 1.0})


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES", "INT8"])
def test_an_input_that_cannot_hold_pixels_is_refused(datatype: str) -> None:
    with pytest.raises(ConfigError, match=f'^image.input: "x" is {datatype}'):
        codec(ANY, 3, 8, 8, datatype=datatype)


def test_one_of_several_inputs_must_be_named_and_the_others_be_optional() -> None:
    with pytest.raises(
        ConfigError, match=r'^image.input: must be given, because the model takes "x", "mask"'
    ):
        ImageCodec(ImageConfig(), TWO_INPUTS)
    with pytest.raises(ConfigError, match=r'^image.input: the model also needs "mask"'):
        ImageCodec(ImageConfig(input="x"), TWO_INPUTS)


def test_an_optional_input_is_left_out() -> None:
    with_optional_mask = Signature(
        (TWO_INPUTS.inputs[0], TensorSpec("mask", "FP32", (ANY, 8, 8), optional=True)), ()
    )
    assert ImageCodec(ImageConfig(), with_optional_mask).decode(file_of(Image.new("RGB", (8, 8)))).keys() == {
        "x"
    }


def test_an_input_of_unknown_rank_takes_the_configured_size() -> None:
    unknown = Signature((TensorSpec("x", "FP32", None),), ())
    made = ImageCodec(ImageConfig(size=(4, 6)), unknown)
    assert made.decode(file_of(Image.new("RGB", (9, 9))))["x"].shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    "config",
    [
        {"sise": (1, 1)},
        {"size": (0, 4)},
        {"resize": 0},
        {"scale": float("nan")},
        {"max_pixels": 0},
        {"mode": "bgr"},
    ],
)
def test_invalid_values_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageConfig(**config)
