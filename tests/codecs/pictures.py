"""Pictures, and codecs that decode them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.image_container import HAS_AVIF
from inferpool.tensors import ANY, Array, Signature, TensorSpec
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", *(["AVIF"] if HAS_AVIF else []))


def signature(*shape: int, datatype: str = "FP32") -> Signature:
    return Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", "FP32", (ANY, 10)),))


def codec(*shape: int, datatype: str = "FP32", **config: Any) -> ImageCodec:
    return ImageCodec(ImageConfig(**config), signature(*shape, datatype=datatype))


def raw_codec(height: int, width: int, **config: Any) -> ImageCodec:
    """Return a codec whose output is the pixels without change: height × width × 3."""
    return codec(ANY, height, width, 3, datatype="UINT8", layout="HWC", **config)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Array:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
