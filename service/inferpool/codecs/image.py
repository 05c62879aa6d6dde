"""Decodes pictures into tensors as `[image]` in a model.toml says, like torchvision does with Pillow images.

A picture goes through these steps, each once and in this order: first frame, EXIF orientation, transparency
on white, 8 bits a channel (the high byte of 16), RGB or grey, bilinear antialiased resize, centre crop,
`(pixel * scale - mean) / std`, layout.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Final

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.codecs.avif import decode_avif
from inferpool.codecs.image_config import ImageConfig, find_input, input_size, pixel_values
from inferpool.codecs.image_container import MEDIA_TYPES, PILLOW_BYTES, Container
from inferpool.codecs.image_files import open_container
from inferpool.codecs.tiff_file import silence_libtiff
from inferpool.codecs.webp import decode_webp
from inferpool.errors import BodyTooLarge, MalformedBody, RequestError
from inferpool.pixel_table import Normalisation
from inferpool.system.cpu_pace import PACE
from inferpool.tensors import FLOATS, Array, Signature, Tensors, TensorSpec

PILLOW_MODES: Final = {"rgb": "RGB", "grey": "L"}
TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that sets a picture upright, by EXIF orientation; orientation 1 needs none."""


_PLUGINS: Final[Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "image/png": PngImagePlugin.PngImageFile,
    "image/jpeg": JpegImagePlugin.JpegImageFile,
    "image/webp": WebPImagePlugin.WebPImageFile,
    "image/gif": GifImagePlugin.GifImageFile,
    "image/bmp": BmpImagePlugin.BmpImageFile,
    "image/tiff": TiffImagePlugin.TiffImageFile,
}
STRIP_PIXELS: Final = 128 * 1024
"""Pixels that are put on white at a time; that takes about a millisecond."""
MOST_PICTURES: Final = 1024
"""The most pictures of a request."""
PICTURES_TOGETHER: Final = 4
"""The pictures of a request may have this many times `max_pixels` together: a small file may have many."""
FIRST_TURNED: Final = 5
"""From this EXIF orientation on, width and height are exchanged."""


class ImageCodec:
    """Makes one row of a model's input from the bytes of a picture; safe to share between threads.

    Attributes:
        input: the name of the input that takes pictures.
        normalisation: turns pixels into the input's numbers; None if the input takes unchanged pixels.
        pixel_spec: the spec of the unchanged pixels, if `decode` returns those and the model normalises them;
            else None.
    """

    media_types: ClassVar[tuple[str, ...]] = MEDIA_TYPES
    normalisation: Normalisation | None
    pixel_spec: TensorSpec | None

    def __init__(self, config: ImageConfig, signature: Signature) -> None:
        """Prepare everything that does not depend on the picture.

        Raises ConfigError, with the key at the front, if `config` and `signature` contradict each other.
        """
        spec = find_input(config, signature)
        self.input: Final = spec.name
        self._pillow_mode = PILLOW_MODES[config.mode]
        self._height, self._width = input_size(config, spec)
        self._resize = config.resize
        self._max_pixels = config.max_pixels
        self._table = Normalisation(
            spec.name, config.layout, self._height, self._width, pixel_values(config, spec)
        )
        self.normalisation = self._table if spec.datatype in FLOATS else None
        self.pixel_spec = None

    def without_normalisation(self) -> ImageCodec:
        """Return a codec that returns unchanged pixels; the model applies the `normalisation`."""
        codec = copy.copy(self)
        codec.pixel_spec = self._table.spec
        return codec

    @property
    def picture(self) -> Normalisation:
        """The input's name, the size of its pictures, and the layout of a row that is normalised."""
        return self._table

    def pixels(self, body: bytes) -> int:
        """Return how many pixels a picture has according to its header; 0 if the header cannot be read."""
        try:
            container = open_container(body)
        except RequestError:
            return 0
        return container.width * container.height

    def decode(self, body: bytes, allowance: Allowance = UNLIMITED) -> Tensors:
        """Decode a file to `{input: tensor}`: one row, C-contiguous; see `pixel_spec`.

        Raises UnsupportedMediaType if the bytes are a picture of another format, MalformedBody if they are
        damaged or not a picture, BodyTooLarge if the picture has more than `max_pixels`, or would take
        unreasonably much work for another reason, and what `Allowance.take` raises.
        """
        container = self._open(body)
        allowance.take(self._decoding_bytes(container), _decoding_text(container))
        return {self.input: self._to_row(self._fit(self._to_pixels(container)))}

    def decode_rows(self, files: Iterable[bytes], count: int, allowance: Allowance = UNLIMITED) -> Tensors:
        """Decode `count` pictures to `{input: tensor}`, one row each, in their order.

        Memory for decoding is taken for one picture at a time. Raises the errors of `decode`, with the number
        of the picture, from 0, and BodyTooLarge for more than `MOST_PICTURES` pictures, or if all of them
        together have more than `PICTURES_TOGETHER` times `max_pixels`.
        """
        if count > MOST_PICTURES:
            raise BodyTooLarge(
                f"the request has {count} pictures; at most {MOST_PICTURES} are taken", limit=MOST_PICTURES
            )
        table = self._table
        shape = (
            (self._height, self._width, table.channels) if self.pixel_spec is not None else table.row_shape
        )
        dtype = np.dtype(np.uint8) if self.pixel_spec is not None else table.values.dtype
        row_bytes = dtype.itemsize * self._height * self._width * table.channels
        allowance.take(count * row_bytes, f"the tensor of {count} pictures")
        rows: Array = np.empty((count, *shape), dtype)
        pixels = 0
        for index, file in enumerate(files):
            try:
                container = self._open(file)
                pixels += container.width * container.height
                if pixels > PICTURES_TOGETHER * self._max_pixels:
                    raise BodyTooLarge(
                        f"the pictures up to this one have {pixels} pixels; a request may have"
                        f" {PICTURES_TOGETHER * self._max_pixels}",
                        limit=PICTURES_TOGETHER * self._max_pixels,
                    )
                size = self._decoding_bytes(container)
                allowance.take(size, _decoding_text(container))
                rows[index] = self._to_row(self._fit(self._to_pixels(container)))[0]
                allowance.give_back(size)
            except RequestError as error:
                raise type(error)(f"picture {index}: {error.detail}", **error.members) from None
        return {self.input: rows}

    def _open(self, body: bytes) -> Container:
        """Read the headers of a picture and check its size."""
        if not body:
            raise MalformedBody("the body is empty; a picture was expected")
        container = open_container(body)
        self._check_size(container.width, container.height)
        return container

    def _decoding_bytes(self, container: Container) -> int:
        """Return how many bytes of memory the pictures between the file and the row take at most."""
        turned = container.orientation >= FIRST_TURNED
        width, height = container.width, container.height
        resized_width, resized_height = self._resized(*((height, width) if turned else (width, height)))
        between = resized_width * max(resized_height, width if turned else height)
        row = self._height * self._width
        row_bytes = row * self._table.channels * (1 + self._table.values.itemsize)
        return (
            len(container.pixels)
            + container.pixel_bytes * width * height
            + PILLOW_BYTES * (between + resized_width * resized_height + row)
            + row_bytes
        )

    def _to_pixels(self, container: Container) -> Image.Image:
        """Decode to an upright picture in the mode of the model."""
        try:
            image: Image.Image | None = None
            if container.media_type == "image/webp":
                image = decode_webp(container.pixels, container.width, container.height)
            elif container.media_type == "image/avif":
                image = decode_avif(container.pixels, container.width, container.height)
            if image is None:
                file = _open_pixels(container)
                self._check_size(*file.size)
                if file.size != (container.width, container.height):
                    raise ValueError(f"the decoder finds {file.size} pixels")
                file.load()
                image = file
                # The file keeps what the decoder needed, as long as somebody refers to it.
                del file
            image = _upright(image, container.orientation)
            PACE.step()
            return _to_mode(image, self._pillow_mode)
        except BodyTooLarge:
            raise
        except (MemoryError, Image.DecompressionBombError):
            raise BodyTooLarge(
                f"a picture of {container.width}×{container.height} pixels needs too much memory"
            ) from None
        # For damaged pictures, Pillow raises nearly any error: OSError, SyntaxError, IndexError…
        except Exception as error:
            kind = container.media_type.removeprefix("image/").upper()
            raise MalformedBody(f"the {kind} picture is damaged or cut short") from error

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop to the size that the model gets."""
        PACE.step()
        width, height = self._resized(*image.size)
        # Pillow resizes the width first, then the height. The picture in between may be larger than both.
        self._check_size(width, max(height, image.height))
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = _crop_start(width, self._width), _crop_start(height, self._height)
        if (width, height) != (self._width, self._height):
            image = image.crop((left, top, left + self._width, top + self._height))
        return image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after torchvision's `Resize(size)` or `Resize((h, w))`."""
        if self._resize is None:
            return self._width, self._height
        if width <= height:
            return self._resize, int(self._resize * height / width)
        return int(self._resize * width / height), self._resize

    def _to_row(self, image: Image.Image) -> Array:
        pixels = np.asarray(image).reshape(1, self._height, self._width, self._table.channels)
        return pixels if self.pixel_spec is not None else self._table.normalise(pixels)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise BodyTooLarge(
                f"the picture comes to {width}×{height} pixels; at most {self._max_pixels} are taken",
                max_pixels=self._max_pixels,
            )


def _decoding_text(container: Container) -> str:
    return f"decoding a picture of {container.width}×{container.height} pixels"


def _open_pixels(container: Container) -> ImageFile.ImageFile:
    # Image.open would also warn, by a limit for the whole process; the limit of the model has been checked.
    if container.media_type == "image/tiff":
        silence_libtiff()
    return _PLUGINS[container.media_type](io.BytesIO(container.pixels))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    transposition = TRANSPOSITIONS.get(orientation)
    return image if transposition is None else image.transpose(transposition)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = _on_white(image)
    if image.mode not in ("L", "1"):
        # CMYK and palettes cannot be converted to grey directly.
        image = _convert(image, "RGB")
    return _convert(image, mode)


def _on_white(image: Image.Image) -> Image.Image:
    """Return `image`, which has transparency, in RGB on a white background."""
    on_white = Image.new("RGB", image.size)
    width, height = image.size
    # Strip by strip, because Pillow holds the GIL meanwhile, and the strips of the steps take little memory.
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        PACE.step()
        strip = _convert(image.crop((0, top, width, min(height, top + rows))), "RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        on_white.paste(strip.convert("RGB"), (0, top))
    return on_white


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Return `image` in `mode`, itself if it has that mode: Pillow would copy it."""
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return the high bytes of 16-bit grey, like Pillow does with 16-bit colours."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _crop_start(length: int, wanted: int) -> int:
    """Return the start of torchvision's CenterCrop; negative if it pads with black first."""
    if wanted > length:
        return -((wanted - length) // 2)
    return round((length - wanted) / 2)
