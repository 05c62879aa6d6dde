"""Answers that are large: their bytes are counted before they are there, and threads encode them.

`reserve` counts an answer before its request runs. `weigh` looks at the outputs, and names the threads in
which `encode` is called.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from inferpool.errors import InvalidInput
from inferpool.http.predict.api import Encoded
from inferpool.http.predict.budget import ByteBudget
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.offload import HEAVY_ANSWER_BYTES, HEAVY_BINARY_BYTES, DecodeOffloader
from inferpool.http.predict.response import Response, compressed
from inferpool.http.predict.served_version import ServedVersion
from inferpool.pool.ports import Result
from inferpool.tensors import Tensors
from inferpool.wire.json_pieces import join_pieces
from inferpool.wire.large_bytes import as_bytes


class EncodedAnswer:
    """A result that a thread has encoded: `encoded` outputs or an `error`, after `encode_s` seconds."""

    __slots__ = ("encode_s", "encoded", "error", "result")

    def __init__(
        self, result: Result, encoded: Encoded | None, error: Exception | None, encode_s: float
    ) -> None:
        self.result = result
        self.encoded = encoded
        self.error = error
        self.encode_s = encode_s


class LargeAnswers:
    """Counts and encodes large answers. `encode` may run in any thread, all else runs on the event loop."""

    def __init__(
        self,
        budget: ByteBudget,
        offloader: DecodeOffloader,
        clock: Callable[[], float],
        *,
        lends_outputs: bool,
    ) -> None:
        """Count in `budget`, and encode in the threads of `offloader`.

        `lends_outputs` says that outputs may be views of memory that is used for others later.
        """
        self._budget = budget
        self._offloader = offloader
        self._clock = clock
        self._lends_outputs = lends_outputs

    def reserve(
        self, context: PredictContext, served: ServedVersion, tensors: Tensors, rows: int, client: str
    ) -> None:
        """Reserve the bytes of a large answer; raises InvalidInput if it is too large, or Overloaded."""
        options, text = context.options, served.view.text
        context.open_answer = served.open_answer
        tokens = 1
        if text is not None:
            parts = [part.tensors for part in context.texts] or [tensors]
            tokens = max(part[text.ids].shape[1] for part in parts)
            if not served.view.batching.enabled:
                rows = sum(len(part[text.ids]) for part in parts)
        elif not served.view.batching.enabled:
            rows = max((len(tensor) for tensor in tensors.values() if tensor.ndim), default=1)
        as_json = context.api.answers_json(context.head, options)
        size = served.answer_bytes(rows, tokens, tensors, options.outputs, options.forms, as_json)
        if size <= HEAVY_ANSWER_BYTES:
            return
        longest = f", the longest of {tokens} tokens" if text is not None else ""
        self._bound(size, f": {rows} rows{longest}")
        self._budget.reserve_answer(context, size, client)

    def weigh(self, context: PredictContext, result: Result, client: str) -> Executor | None:
        """Return the threads in which a large answer is to be encoded, None if it is not large.

        Counts the bytes of an answer whose size was not known before. Raises Overloaded if there is no room.
        """
        served, outputs = context.served, result.outputs
        if served is None or outputs is None:
            return None
        as_json = context.api.answers_json(context.head, context.options)
        if context.open_answer:
            size = served.measured_bytes(outputs, as_json)
            if size > HEAVY_ANSWER_BYTES and size > context.answer_bytes:
                self._bound(size, "")
                self._budget.reserve_answer(context, size - context.answer_bytes, client)
        # An API that makes something else of the outputs takes as long for them as for JSON.
        is_slow = as_json or context.options.request is not None
        if context.answer_bytes <= (HEAVY_ANSWER_BYTES if is_slow else HEAVY_BINARY_BYTES):
            return None
        return self._offloader.begin_answer(context, client)

    def encode(self, context: PredictContext, result: Result) -> EncodedAnswer:
        """Encode a large answer, compressed if the client accepts that; in a background thread."""
        served, outputs = context.served, result.outputs
        assert served is not None  # `weigh` found both
        assert outputs is not None
        began = self._clock()
        encoded: Encoded | None = None
        failure: Exception | None = None
        try:
            encoded = context.api.encode(
                context.head,
                context.options,
                context.request_id,
                served,
                outputs,
                lambda pieces: join_pieces(pieces, lambda: not context.abandoned),
            )
            if self._lends_outputs:
                # Here, and not on the event loop: views of memory that an engine lends are copied.
                encoded = Encoded(encoded.headers, list(map(as_bytes, encoded.parts)))
            if context.head.accepts_gzip():
                packed = compressed(Response(200, encoded.headers, encoded.parts, 0))
                encoded = Encoded(packed.headers, packed.parts)
        except Exception as error:  # noqa: BLE001 - outputs that cannot be encoded fail this request alone
            failure = error
        return EncodedAnswer(result, encoded, failure, self._clock() - began)

    def _bound(self, size: int, rows_text: str) -> None:
        """Raise InvalidInput if an answer of `size` bytes would leave no memory for other requests."""
        most = self._budget.answers_limit
        if size > most:
            raise InvalidInput(
                f"the response would take about {size} bytes{rows_text}; the limit is {most} bytes; send"
                " fewer rows at a time, or ask for fewer outputs",
                expected=most,
                got=size,
            )
