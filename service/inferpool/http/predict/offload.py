"""Bodies that take so long to be read that another thread does it, and how many of them may wait."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final

from inferpool.errors import Overloaded
from inferpool.http.predict.api import Data
from inferpool.http.predict.context import PredictContext
from inferpool.repository.catalog import Catalog

HEAVY_BYTES: Final = 32 * 1024
"""Bodies to decode, and bodies and answers to unpack or pack, that are larger go to another thread."""
HEAVY_JSON_BYTES: Final = 128 * 1024
"""Longer JSON is read in another thread: it takes a tenth of a millisecond or two."""
HEAVY_PIXELS: Final = 128 * 128
"""Pictures with more pixels are decoded in another thread."""
HEAVY_TEXT_BYTES: Final = 2 * 1024
"""Longer bodies for a model that takes text are encoded in another thread: they take half a millisecond."""
MOST_TEXT_BYTES: Final = 8 * 2**20
"""Bodies of text that may wait to be encoded, in all; a megabyte takes the better part of a second."""
TEXT_THREADS: Final = 2
"""Threads that encode long texts."""
JSON_THREADS: Final = min(8, max(2, os.cpu_count() or 1))
"""Threads that read long JSON: not those that write `/metrics`."""
_UNPACKED: Final = ("application/x-npz", "multipart/form-data")
_DECODED: Final = ("image/", "multipart/")


class DecodeOffloader:
    """Tells which bodies are heavy, and whose threads read them."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        # Of their own, so that nothing else waits for a long text to be encoded.
        self._text_bytes = 0
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._json_threads = ThreadPoolExecutor(JSON_THREADS, thread_name_prefix="json")

    def is_heavy(self, call: PredictContext, data: Data) -> bool:
        """Whether reading a body would keep the event loop from its other work."""
        head = call.head
        if head.content_encoding or head.content_type in _UNPACKED:
            return True
        if len(data) > HEAVY_TEXT_BYTES and self._may_be_text(call):
            return True
        if _is_heavy_json(call, len(data)) or _holds_strings(call, len(data)):
            return True
        if len(data) > HEAVY_BYTES:
            return head.content_type.startswith(_DECODED)
        if head.content_type.startswith("image/") and call.served is not None:
            # A picture costs what its pixels do, and a small file may have many.
            image = call.served.view.image
            return image is not None and image.pixels(bytes(data)) > HEAVY_PIXELS
        return False

    def check_room(self, call: PredictContext, size: int) -> None:
        """Raise Overloaded where a body of `size` bytes is text, and too much of it waits already."""
        if self._text_bytes and self._text_bytes + size > MOST_TEXT_BYTES and self._may_be_text(call):
            raise Overloaded(f"{self._text_bytes} bytes of text wait to be encoded already")

    def begin(self, call: PredictContext, size: int) -> Executor | None:
        """A heavy body of `size` bytes is about to be read: by whose thread, None for whichever there is."""
        call.aside_bytes = max(1, size)
        if self._may_be_text(call):
            call.aside_text = True
            self._text_bytes += call.aside_bytes
            return self._text_threads
        return self._json_threads if _is_heavy_json(call, size) or _holds_strings(call, size) else None

    def end(self, call: PredictContext) -> None:
        """It has been read."""
        if call.aside_text:
            self._text_bytes -= call.aside_bytes
        call.aside_bytes, call.aside_text = 0, False

    def _may_be_text(self, call: PredictContext) -> bool:
        """Whether the body is for a model that takes text, or may be where it is to name its model."""
        if call.served is not None:
            return call.served.view.text is not None
        defaults = (model.default for model in self._catalog.models().values())
        return any(view is not None and view.text is not None for view in defaults)


def _is_heavy_json(call: PredictContext, size: int) -> bool:
    return size > HEAVY_JSON_BYTES and call.api.json_bytes(call.head, size) > HEAVY_JSON_BYTES


def _holds_strings(call: PredictContext, size: int) -> bool:
    """Whether a body is many strings in binary form: each is made; numbers are views of the body."""
    if size <= HEAVY_JSON_BYTES or call.head.header_length is None or call.served is None:
        return False
    return any(spec.datatype == "BYTES" for spec in call.served.signature.inputs)
