"""The table `[image]` of a model.toml, and what follows from it for the input of a model."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from inferpool.errors import ConfigError
from inferpool.tensors import (
    ANY,
    FLOATS,
    Array,
    Signature,
    TensorSpec,
    fp32_to_bf16,
    names_text,
    shape_text,
)

Side: TypeAlias = Annotated[int, Field(ge=1, le=16_384)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]

CHANNELS: Final = {"rgb": 3, "grey": 1}
PIXEL_INTEGERS: Final = ("UINT8", "UINT16", "UINT32", "UINT64", "INT16", "INT32", "INT64")
"""The integer datatypes that hold every pixel value from 0 to 255."""


class ImageConfig(BaseModel):
    """The table `[image]` of a model.toml; the descriptions of its keys are also those of the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str | None = Field(
        default=None,
        description="The input that takes the picture.",
        json_schema_extra={"unset": "the only one"},
    )
    size: tuple[Side, Side] | None = Field(
        default=None,
        description="`[height, width]` in pixels that the model gets.",
        json_schema_extra={"unset": "from the model"},
    )
    resize: Side | None = Field(
        default=None,
        description="Resize the shorter side to this many pixels and cut out the centre. Without it the"
        " picture is resized to `size`, whatever its proportions.",
    )
    mode: Literal["rgb", "grey"] = Field(default="rgb", description='`"rgb"` or `"grey"`.')
    layout: Literal["CHW", "HWC", "HW"] = Field(
        default="CHW", description='Order of a row\'s dimensions: `"CHW"`, `"HWC"`, or `"HW"` (grey).'
    )
    scale: Number | None = Field(
        default=None, description="Factor for a pixel, 0 to 255.", json_schema_extra={"unset": "1/255"}
    )
    mean: Number | tuple[Number, ...] | None = Field(
        default=None, description="Subtracted after `scale`: one number, or a list with one number a channel."
    )
    std: Number | tuple[Number, ...] | None = Field(
        default=None, description="Divisor after `mean`: one number, or a list with one number a channel."
    )
    max_pixels: Annotated[int, Field(ge=1, le=2**32)] = Field(
        default=50_000_000, description="A larger picture is refused before it is decoded."
    )


def find_input(config: ImageConfig, signature: Signature) -> TensorSpec:
    """Return the input that takes the picture.

    Raises ConfigError if it does not exist, is not named but not the only one, or is not enough for the
    model.
    """
    if config.input is not None:
        spec = signature.inputs_by_name.get(config.input)
        if spec is None:
            raise ConfigError(
                f'image.input: no input is called "{config.input}"; '
                f"the model takes {names_text(signature.inputs_by_name)}"
            )
    else:
        spec = signature.single_input
        if spec is None:
            raise ConfigError(
                f"image.input: must be given, because the model takes {names_text(signature.inputs_by_name)}"
            )
    others = [other.name for other in signature.inputs if other != spec and not other.optional]
    if others:
        raise ConfigError(f"image.input: the model also needs {names_text(others)}, which no picture gives")
    return spec


def input_size(config: ImageConfig, spec: TensorSpec) -> tuple[int, int]:
    """Return height and width of the pixels that the model gets.

    Raises ConfigError if `config` contradicts a dimension of the input, or a dimension is not known.
    """
    channels = CHANNELS[config.mode]
    if config.layout == "HW" and channels != 1:
        raise ConfigError('image.layout: "HW" has no room for colours; it needs mode = "grey"')
    shape = spec.shape if spec.shape is not None else (ANY,) * (1 + len(config.layout))
    if len(shape) != 1 + len(config.layout):
        raise ConfigError(
            f'image.layout: "{config.layout}" after the rows makes {1 + len(config.layout)} dimensions, '
            f'but "{spec.name}" is {shape_text(shape)}'
        )
    if shape[0] not in (ANY, 1):
        raise ConfigError(
            f'image.input: a picture makes one row, but "{spec.name}" takes {shape[0]} rows and no others'
        )
    fixed = dict(zip(config.layout, shape[1:], strict=True))
    if fixed.get("C", channels) not in (ANY, channels):
        raise ConfigError(
            f'image.mode: "{config.mode}" with layout = "{config.layout}" makes {channels} channel(s), '
            f'but "{spec.name}" is {shape_text(shape)}'
        )
    if config.size is None:
        if ANY in (fixed["H"], fixed["W"]):
            raise ConfigError(
                f'image.size: must be given as [height, width], because "{spec.name}" is {shape_text(shape)}'
            )
        height, width = fixed["H"], fixed["W"]
    else:
        height, width = config.size
        if fixed["H"] not in (ANY, height) or fixed["W"] not in (ANY, width):
            raise ConfigError(
                f'image.size: {shape_text(config.size)} does not fit "{spec.name}", which is '
                f"{shape_text(shape)} in the layout {config.layout}"
            )
    if height * width > config.max_pixels:
        raise ConfigError(f"image.size: {height}×{width} is more than image.max_pixels = {config.max_pixels}")
    return height, width


def pixel_values(config: ImageConfig, spec: TensorSpec) -> Array:
    """Return the number that each of the 256 pixel values becomes, for each channel: [channels, 256].

    They are computed in double precision and rounded once, to the input's datatype. Raises ConfigError if
    `config` does not fit the datatype.
    """
    channels = CHANNELS[config.mode]
    pixels = np.tile(np.arange(256), (channels, 1))
    if spec.datatype in PIXEL_INTEGERS:
        for key in ("scale", "mean", "std"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f'image.{key}: "{spec.name}" is {spec.datatype} and takes unchanged pixels, 0 to 255'
                )
        return pixels.astype(spec.dtype)
    if spec.datatype not in FLOATS:
        raise ConfigError(f'image.input: "{spec.name}" is {spec.datatype}, which cannot hold pixels')
    scale = 1 / 255 if config.scale is None else config.scale
    mean = _by_channel("mean", config.mean, 0.0, channels)
    std = _by_channel("std", config.std, 1.0, channels)
    if not std.all():
        raise ConfigError("image.std: must not be 0, because it is divided by")
    with np.errstate(over="ignore"):
        scaled: Array = (pixels * scale - mean) / std
        values = scaled.astype(np.float32 if spec.datatype == "BF16" else spec.dtype)
    if not np.isfinite(values).all():
        raise ConfigError(f"image.scale: with mean and std, pixels become too large for {spec.datatype}")
    return fp32_to_bf16(values) if spec.datatype == "BF16" else values


def _by_channel(
    key: str, value: float | tuple[float, ...] | None, default: float, channels: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return `value` as a column of one number a channel."""
    numbers = value if isinstance(value, tuple) else (default if value is None else value,) * channels
    if len(numbers) != channels:
        raise ConfigError(f"image.{key}: {len(numbers)} numbers for {channels} channel(s)")
    return np.array(numbers, np.float64)[:, np.newaxis]
