"""Decides which bodies a background thread decodes and which answers it encodes, and bounds how many wait."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Final

from inferpool.errors import Overloaded
from inferpool.http.media_types import ARROW_FILE, ARROW_STREAM, CSV, FORM, MEANT_AS_JSON, NPZ, PARQUET
from inferpool.http.predict.api import Data
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.fair_threads import FairThreads
from inferpool.http.predict.response_cache import HASHED_BYTES
from inferpool.repository.catalog import Catalog, ModelView
from inferpool.system.cpu import usable_cores

HEAVY_BYTES: Final = 32 * 1024
"""Larger bodies are decoded, and larger bodies and responses are (de)compressed, in a background thread."""
HEAVY_JSON_BYTES: Final = 128 * 1024
"""Longer JSON is read in a background thread: it takes more than a tenth of a millisecond."""
HEAVY_PIXELS: Final = 128 * 128
"""Images with more pixels are decoded in a background thread."""
HEAVY_TEXT_BYTES: Final = 2 * 1024
"""Longer bodies for a model with a text input go to a background thread: they take half a millisecond."""
MOST_TEXT_BYTES: Final = 8 * 2**20
"""Bytes of text that may wait to be encoded; one megabyte takes most of a second."""
TEXT_THREADS: Final = 2
"""Threads that encode the long texts of one client."""
JSON_THREADS: Final = min(8, max(2, usable_cores()))
"""Threads that read the long JSON of one client."""
FILE_THREADS: Final = min(32, usable_cores())
"""Threads that decode the pictures, archives, forms and compressed bodies of one client.

Each of them takes a core; the memory of what they decode is bounded by the budget.
"""
URL_THREADS: Final = 16
"""Threads that read the JSON of one client whose strings may be URLs: they mostly wait for other hosts."""
COUNTED_ANSWER_BYTES: Final = 16 * 1024
"""Answers of more bytes, by the rows of their requests, are estimated."""
HEAVY_ANSWER_BYTES: Final = 256 * 1024
"""Answers of more bytes, as tensors and as JSON, are counted and are encoded in a background thread."""
HEAVY_BINARY_BYTES: Final = 4 * 2**20
"""Answers in binary form of more bytes are encoded in a background thread: each byte is copied once."""
HUGE_ANSWER_BYTES: Final = 16 * 2**20
"""Answers of more bytes to one client are encoded one at a time, so its others need not wait for them."""
ANSWER_THREADS: Final = 2
"""Threads that encode the large answers to one client, those that are not huge."""
HEAVY_CSV_BYTES: Final = 4 * 1024
"""Longer CSV is read in a background thread: each cell takes most of a microsecond."""
_UNPACKED: Final = frozenset((NPZ, FORM, ARROW_STREAM, ARROW_FILE, PARQUET))
"""Media types that are decompressed or taken apart, whatever their size."""
_DECODED: Final = ("image/", "multipart/")
"""How media types begin that are decoded, not viewed."""
_LONG_STRING: Final = re.compile(rb'"[^"\[\]{}]{24,}')
"""A string that is long enough for a picture. Base64 has no brackets, and lists of numbers begin with one."""


class DecodeOffloader:
    """Decides where a body is decoded.

    Attributes:
        fetches_pictures: whether strings of JSON may be URLs of pictures, which take time to fetch.
    """

    def __init__(self, catalog: Catalog) -> None:
        """Start no thread before the first body needs one; `catalog` tells which models take text."""
        self._catalog = catalog
        self._models: Mapping[str, ModelView] | None = None
        self._any_takes_pictures = False
        # Separate threads, so that nothing else waits while a long text is encoded, or a picture decoded. The
        # event loop's own threads write `/metrics`.
        self._text_bytes = 0
        self._text_threads = FairThreads(TEXT_THREADS, "text")
        self._json_threads = FairThreads(JSON_THREADS, "json")
        self._file_threads = FairThreads(FILE_THREADS, "file")
        self._url_threads = FairThreads(URL_THREADS, "url")
        self.fetches_pictures = False
        self._answer_threads = FairThreads(ANSWER_THREADS, "answer")
        self._huge_answers = FairThreads(1, "huge-answer")

    def is_heavy(self, context: PredictContext, data: Data) -> bool:
        """Return whether decoding a body would keep the event loop from its other work for too long."""
        head = context.head
        if head.content_encoding or head.content_type in _UNPACKED:
            return True
        if self.fetches_pictures and self._may_hold_urls(context):
            return True
        size = len(data)
        if size > HEAVY_TEXT_BYTES and self._may_be_text(context):
            return True
        if size > HEAVY_JSON_BYTES and (_is_heavy_json(context, size) or _holds_strings(context, size)):
            return True
        if size > HASHED_BYTES and context.served is not None and context.served.cache is not None:
            return True
        if size > HEAVY_CSV_BYTES and head.content_type == CSV:
            return True
        if size > HEAVY_BYTES and head.content_type.startswith(_DECODED):
            return True
        served = context.served
        if served is None:
            return self._takes_pictures() and _may_hold_pictures(context, data)
        image = served.view.image
        if image is None:
            return False
        if head.content_type.startswith("image/"):
            # Decoding an image takes time by its pixels, and a small file may have many of them.
            return image.pixels(bytes(data)) > HEAVY_PIXELS
        return _may_hold_pictures(context, data)

    def begin(self, context: PredictContext, size: int, client: str) -> Executor:
        """Count a heavy body of `size` bytes, and return the threads to decode it in; call `end` afterwards.

        `client` is the address of the client, who shares the threads with others. Raises Overloaded if too
        much text waits already.
        """
        may_be_text = self._may_be_text(context)
        if may_be_text and self._text_bytes and self._text_bytes + size > MOST_TEXT_BYTES:
            raise Overloaded(
                f"no room for {size} bytes of text: {self._text_bytes} of {MOST_TEXT_BYTES} bytes wait to be"
                " encoded; try again later"
            )
        context.offloaded_bytes = max(1, size)
        if may_be_text:
            context.offloaded_text = True
            self._text_bytes += context.offloaded_bytes
            return self._text_threads.of(client)
        if self.fetches_pictures and self._may_hold_urls(context):
            return self._url_threads.of(client)
        is_json = _is_heavy_json(context, size) or _holds_strings(context, size)
        return (self._json_threads if is_json else self._file_threads).of(client)

    def begin_answer(self, context: PredictContext, client: str) -> Executor:
        """Return the threads to encode a large answer to `client` in; call `end` afterwards."""
        context.offloaded_bytes = max(1, context.answer_bytes)
        is_huge = context.answer_bytes > HUGE_ANSWER_BYTES
        return (self._huge_answers if is_huge else self._answer_threads).of(client)

    def end(self, context: PredictContext) -> None:
        """Count that the thread is done with the body, or with the answer."""
        if context.offloaded_text:
            self._text_bytes -= context.offloaded_bytes
        context.offloaded_bytes, context.offloaded_text = 0, False

    def _may_hold_urls(self, context: PredictContext) -> bool:
        """Return whether a body is JSON for a model that takes pictures, or that only the body names."""
        if context.head.content_type not in MEANT_AS_JSON:
            return False
        return self._takes_pictures() if context.served is None else context.served.view.image is not None

    def _takes_pictures(self) -> bool:
        """Return whether any model takes pictures."""
        models = self._catalog.models()
        if models is not self._models:  # each change of the catalog makes another mapping
            defaults = [model.default for model in models.values()]
            self._any_takes_pictures = any(view is not None and view.image is not None for view in defaults)
            self._models = models
        return self._any_takes_pictures

    def _may_be_text(self, context: PredictContext) -> bool:
        """Return whether the model takes text; if the body has to name the model, whether any model does."""
        if context.served is not None:
            return context.served.view.text is not None
        defaults = (model.default for model in self._catalog.models().values())
        return any(view is not None and view.text is not None for view in defaults)


def _may_hold_pictures(context: PredictContext, data: Data) -> bool:
    """Return whether a body is JSON with a string that may be a picture in base64.

    Such a picture is decoded where its memory is counted, however short the string is.
    """
    return context.head.content_type in MEANT_AS_JSON and _LONG_STRING.search(data) is not None


def _is_heavy_json(context: PredictContext, size: int) -> bool:
    return size > HEAVY_JSON_BYTES and context.api.json_bytes(context.head, size) > HEAVY_JSON_BYTES


def _holds_strings(context: PredictContext, size: int) -> bool:
    """Return whether a large binary body holds strings: each becomes an object, numbers do not."""
    if size <= HEAVY_JSON_BYTES or context.head.header_length is None or context.served is None:
        return False
    return any(spec.datatype == "BYTES" for spec in context.served.signature.inputs)
