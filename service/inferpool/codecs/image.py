"""Pictures to tensors: what `[image]` in a model.toml says, done as torchvision does it on Pillow images.

A picture goes through these steps, each exactly once and in this order: first frame, EXIF orientation,
transparency laid on white, 8 bits a channel (of 16, the high byte), RGB or grey, bilinear antialiased resize,
centre crop, `(pixel * scale - mean) / std`, layout.
"""

from __future__ import annotations

import copy
import io
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from pydantic import BaseModel, ConfigDict, Field

from inferpool.codecs.image_files import MEDIA_TYPES, Container, open_container
from inferpool.errors import BodyTooLarge, ConfigError, MalformedBody, RequestError
from inferpool.pixel_table import Normalisation
from inferpool.tensors import (
    ANY,
    FLOATS,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    fp32_to_bf16,
    names_text,
    shape_text,
)

Side: TypeAlias = Annotated[int, Field(ge=1)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]

CHANNELS: Final = {"rgb": 3, "grey": 1}
PILLOW_MODES: Final = {"rgb": "RGB", "grey": "L"}
INTEGERS: Final = ("UINT8", "UINT16", "UINT32", "UINT64", "INT16", "INT32", "INT64")
"""Those that hold every pixel from 0 to 255."""

TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what sets the picture upright; 1 needs nothing."""


class ImageConfig(BaseModel):
    """The table `[image]` of a model.toml.

    Attributes:
        input: the input that takes the picture; the model's single one when left out.
        size: `[height, width]` in pixels that the model gets; its own fixed dimensions when left out.
        resize: the shorter side is resized to this many pixels and the centre of `size` is cut out; when left
            out, the picture is resized straight to `size`, whatever its proportions.
        mode: colours that the model gets; one channel when grey.
        layout: the order of a row's dimensions: channels first, channels last, or no channels (grey).
        scale: what a pixel, 0 to 255, is multiplied by; 1/255 when left out.
        mean: subtracted after `scale`: one number, or one a channel.
        std: divided by after `mean`: one number, or one a channel.
        max_pixels: a picture with more is refused before it is decoded, and one that would pass through more
            on its way to `size` before it is resized.
    """

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
    max_pixels: Annotated[int, Field(ge=1)] = Field(
        default=50_000_000, description="A larger picture is refused before it is decoded."
    )


class ImageCodec:
    """Makes one row of a model's input from the bytes of a picture; safe to share between threads.

    Attributes:
        normalisation: how pixels become the input's numbers; None where it takes them as they are.
        left: what `decode` gives instead of the input, where its pixels are normalised later; else None.
    """

    media_types: ClassVar[tuple[str, ...]] = MEDIA_TYPES
    normalisation: Normalisation | None
    left: TensorSpec | None

    def __init__(self, config: ImageConfig, signature: Signature) -> None:
        """Settle everything that does not depend on the picture.

        Raises ConfigError, with the key at the front, where `config` and `signature` contradict each other.
        """
        spec = _find_input(config, signature)
        self._name = spec.name
        self._pillow_mode = PILLOW_MODES[config.mode]
        self._height, self._width = _settle_size(config, spec)
        self._resize = config.resize
        self._max_pixels = config.max_pixels
        self._table = Normalisation(
            spec.name, config.layout, self._height, self._width, _pixel_values(config, spec)
        )
        self.normalisation = self._table if spec.datatype in FLOATS else None
        self.left = None

    def leaving_pixels(self) -> ImageCodec:
        """The same, but for the last steps: it leaves it to the model to apply the `normalisation`."""
        leaving = copy.copy(self)
        leaving.left = self._table.spec
        return leaving

    def pixels(self, body: bytes) -> int:
        """How many pixels a picture has, by its header; 0 where that cannot be read."""
        try:
            container = open_container(body)
        except RequestError:
            return 0
        return container.width * container.height

    def decode(self, body: bytes) -> Tensors:
        """Decode a PNG, JPEG or WebP file to `{input: tensor}`: one row, C-contiguous; see `left`.

        Raises UnsupportedMediaType if the bytes are a picture of another format, MalformedBody if they are
        damaged or no picture, and BodyTooLarge if the picture has more than `max_pixels`, or would need
        unreasonable work otherwise.
        """
        if not body:
            raise MalformedBody("the body is empty where a picture was expected")
        container = open_container(body)
        self._bound(container.width, container.height)
        return {self._name: self._to_row(self._fit(self._to_pixels(container)))}

    def _to_pixels(self, container: Container) -> Image.Image:
        """Decode to an upright picture in the wanted mode."""
        try:
            image = _open_pixels(container)
            self._bound(*image.size)
            image.load()
            upright = TRANSPOSITIONS.get(container.orientation)
            return _to_mode(image if upright is None else image.transpose(upright), self._pillow_mode)
        except BodyTooLarge:
            raise
        except (MemoryError, Image.DecompressionBombError):
            raise BodyTooLarge(
                f"a picture of {container.width}×{container.height} pixels needs too much memory"
            ) from None
        # Damaged pictures make Pillow raise nearly anything: OSError, SyntaxError, struct.error, IndexError…
        except Exception as error:
            kind = container.media_type.removeprefix("image/").upper()
            raise MalformedBody(f"the {kind} picture is damaged or cut short") from error

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop to the wanted size."""
        width, height = self._resized(*image.size)
        # Pillow resizes across first, then down: the picture between the two may be larger than either end.
        self._bound(width, max(height, image.height))
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = _crop_start(width, self._width), _crop_start(height, self._height)
        if (width, height) != (self._width, self._height):
            image = image.crop((left, top, left + self._width, top + self._height))
        return image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after the resize: torchvision's `Resize(size)` or `Resize((h, w))`."""
        if self._resize is None:
            return self._width, self._height
        if width <= height:
            return self._resize, int(self._resize * height / width)
        return int(self._resize * width / height), self._resize

    def _to_row(self, image: Image.Image) -> Array:
        pixels = np.asarray(image).reshape(1, self._height, self._width, self._table.channels)
        return pixels if self.left is not None else self._table.normalise(pixels)

    def _bound(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise BodyTooLarge(
                f"the picture comes to {width}×{height} pixels; at most {self._max_pixels} are taken",
                max_pixels=self._max_pixels,
            )


def _open_pixels(container: Container) -> ImageFile.ImageFile:
    # Not Image.open: that checks against a limit shared by the whole process, and warns; ours is checked.
    file = io.BytesIO(container.pixels)
    if container.media_type == "image/png":
        return PngImagePlugin.PngImageFile(file)
    if container.media_type == "image/jpeg":
        return JpegImagePlugin.JpegImageFile(file)
    return WebPImagePlugin.WebPImageFile(file)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "1"):
        # CMYK and palettes have no direct way to grey.
        image = image.convert("RGB")
    return image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit grey, as Pillow itself does with 16-bit colours."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _crop_start(length: int, wanted: int) -> int:
    """Return where torchvision's CenterCrop starts; negative where it pads with black first."""
    if wanted > length:
        return -((wanted - length) // 2)
    return round((length - wanted) / 2)


def _find_input(config: ImageConfig, signature: Signature) -> TensorSpec:
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


def _settle_size(config: ImageConfig, spec: TensorSpec) -> tuple[int, int]:
    """Return height and width of what the model gets, having checked every dimension of the input."""
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


def _pixel_values(config: ImageConfig, spec: TensorSpec) -> Array:
    """Return what each of the 256 pixel values becomes, channel by channel: [channels, 256].

    In double precision, rounded once to the input's datatype.
    """
    channels = CHANNELS[config.mode]
    pixels = np.tile(np.arange(256), (channels, 1))
    if spec.datatype in INTEGERS:
        for key in ("scale", "mean", "std"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f'image.{key}: "{spec.name}" is {spec.datatype} and gets the pixels as they are, 0 to 255'
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
