"""Prints, for every kind of picture, the bytes that decoding it takes, and those that were asked for.

A process of its own runs this: the peak of its memory begins anew with every picture.
"""

from __future__ import annotations

import gc
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.budget import BodyAllowance, ByteBudget
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead
from inferpool.tensors import ANY, Signature, TensorSpec
from PIL import Image

SIDE = 1400
PROC = Path("/proc/self")


def counting_allowance(signature: Signature | None = None) -> tuple[BodyAllowance, ByteBudget]:
    """Return an allowance that grants everything, and the budget that counts it in `decoded`."""
    budget = ByteBudget(2**62)
    context = PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)
    return BodyAllowance(budget, context, 2**62, signature), budget


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def pictures() -> dict[str, Callable[[], bytes]]:
    """One file of each way in which pictures are decoded, by name."""
    colours = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    tile = np.tile(colours, (SIDE // 64 + 1, SIDE // 64 + 1, 1))[:SIDE, :SIDE]
    rgba = Image.fromarray(tile)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(tile[..., 0].astype(np.uint16) * 257)
    flat, clear = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "PNG RGB": lambda: file_of(rgb, "PNG"),
        "PNG RGB turned": lambda: file_of(rgb, "PNG", exif=turned),
        "PNG RGBA": lambda: file_of(rgba, "PNG"),
        "PNG RGBA turned": lambda: file_of(rgba, "PNG", exif=turned),
        "PNG grey with alpha": lambda: file_of(rgba.convert("LA"), "PNG"),
        "PNG palette": lambda: file_of(rgb.quantize(16), "PNG", transparency=0),
        "PNG grey": lambda: file_of(grey, "PNG"),
        "PNG 1 bit": lambda: file_of(grey.convert("1"), "PNG", transparency=0),
        "PNG 16 bits": lambda: file_of(deep, "PNG"),
        "PNG 16 bits with transparency": lambda: file_of(deep, "PNG", transparency=257),
        "JPEG": lambda: file_of(flat, "JPEG"),
        "JPEG turned": lambda: file_of(flat, "JPEG", exif=turned),
        "JPEG progressive": lambda: file_of(flat, "JPEG", progressive=True, subsampling=0),
        "JPEG CMYK": lambda: file_of(flat.convert("CMYK"), "JPEG", progressive=True, subsampling=0),
        "JPEG grey": lambda: file_of(grey, "JPEG"),
        "GIF": lambda: file_of(rgb.quantize(16), "GIF"),
        "GIF with transparency": lambda: file_of(rgb.quantize(16), "GIF", transparency=0),
        "BMP": lambda: file_of(rgb, "BMP"),
        "BMP palette": lambda: file_of(rgb.quantize(16), "BMP"),
        "TIFF": lambda: file_of(rgb, "TIFF"),
        "TIFF LZW turned": lambda: file_of(rgb, "TIFF", compression="tiff_lzw", exif=turned),
        "TIFF in one strip": lambda: file_of(
            rgba, "TIFF", compression="tiff_adobe_deflate", strip_size=2**30
        ),
        "TIFF 16 bits": lambda: file_of(deep, "TIFF", compression="tiff_lzw", strip_size=2**30),
        "TIFF fax": lambda: file_of(grey.convert("1"), "TIFF", compression="group4"),
        "WebP": lambda: file_of(flat, "WEBP"),
        "WebP with alpha": lambda: file_of(rgba, "WEBP", quality=1, method=0),
        "WebP lossless": lambda: file_of(clear, "WEBP", lossless=True, exact=True),
        "AVIF": lambda: file_of(rgb, "AVIF", quality=1, speed=10),
        "AVIF with alpha": lambda: file_of(rgba, "AVIF", quality=1, speed=10, subsampling="4:4:4"),
        "WebP turned": lambda: file_of(clear, "WEBP", lossless=True, exact=True, exif=turned),
    }


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", (PROC / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def codecs() -> dict[str, ImageCodec]:
    """Codecs for small pictures, and for large ones with a row of their own size."""
    made = {}
    for name, side, resize in (("small", 224, 256), ("large", SIDE, None)):
        spec = TensorSpec("x", "FP32", (ANY, 3, side, side))
        made[name] = ImageCodec(ImageConfig(mode="rgb", layout="CHW", resize=resize), Signature((spec,), ()))
    return made


def main() -> None:
    ways = codecs()
    for codec in ways.values():
        codec.decode(file_of(Image.new("RGB", (8, 8)), "PNG"))
    for name, make in pictures().items():
        body = make()
        for way, codec in ways.items():
            gc.collect()
            before = resident("VmRSS")
            (PROC / "clear_refs").write_text("5")
            allowance, budget = counting_allowance()
            codec.decode(body, allowance)
            json.dump(
                {"name": f"{name}, {way}", "peak": resident("VmHWM") - before, "taken": budget.decoded},
                sys.stdout,
            )
            print(flush=True)


if __name__ == "__main__":
    main()
