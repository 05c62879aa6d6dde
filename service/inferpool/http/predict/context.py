"""The state of one predict request between its head and its response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from inferpool.codecs.text import Rows
from inferpool.http.access.caller import NOBODY, Caller
from inferpool.http.access.tenants import Tenant
from inferpool.http.predict.api import InferenceApi, Options
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.request_id import new_request_id
from inferpool.http.predict.response_cache import NOT_CACHED
from inferpool.http.predict.served_version import ServedVersion
from inferpool.pool.ports import Entry
from inferpool.tensors import Tensors

_NO_OPTIONS: Final = Options()


class PredictContext:
    """The state of one predict request.

    Attributes:
        api: the API that the request uses.
        head: what its path and headers say.
        began: the moment at which the head was complete, by the predictor's clock.
        request_id: the caller's id, or a new one.
        caller: who sent the request; `NOBODY` until the gate has let it pass.
        options: what the body says beside its tensors, once the body is decoded.
        decode_s: seconds that decoding took.
        reserved_bytes: bytes of its body and response that it holds of the budget of all requests in flight.
        decoded_bytes: bytes that it holds of this budget for what a thread has made of its body.
        input_bytes: bytes of its tensors, if a thread has counted them; else 0.
        answer_bytes: those of the reserved bytes that are for a large answer.
        open_answer: whether only the outputs tell how large the answer is.
        peer: the address at the other end of the connection, which may be a proxy's; "" for a Unix socket.
        tenant: to whom the caller's key belongs; None while the server has no keys.
        client: the client for which the large answer is counted.
        offloaded_bytes: size of the body while a background thread decodes it, else 0.
        offloaded_text: whether these bytes count as text that waits to be encoded.
        abandoned: whether nobody waits for the response any more although a thread still has the body.
        recorded: whether the end of the request has been recorded.
        served: the version that answers; None until it is known.
        texts: the tokens of a text input, by the entries that run them.
        entry: the entry that a queue has accepted, until its response is written.
        cache_key: stands for its inputs in the response cache; None if its answer is not cached.
        cache_status: index of its header in `CACHE_HEADERS`; `NOT_CACHED` for none.
        flight: the `Flight` that it shares with equal requests; None without one.
        leads: whether equal requests may wait for its run.
        observation: the `Observation` of it, if it is a sample or counted; None for most requests.
        observed: its inputs, if its version has an observer, which decides after the response.
        outputs: the outputs that were encoded, if its version has an observer.
        ended: when they were, in seconds since 1970.
        sentences: the sentences of a text input, if samples have them.
    """

    __slots__ = (
        "abandoned", "answer_bytes", "api", "began", "cache_key", "cache_status", "caller", "client",
        "decode_s", "decoded_bytes", "ended", "entry", "flight", "head", "input_bytes", "leads",
        "observation", "observed", "offloaded_bytes", "offloaded_text", "open_answer", "options", "outputs",
        "peer", "recorded", "request_id", "reserved_bytes", "sentences", "served", "tenant", "texts",
    )  # fmt: skip

    def __init__(self, api: InferenceApi, head: RequestHead, began: float) -> None:
        self.api = api
        self.head = head
        self.began = began
        self.request_id = head.given_id or new_request_id()
        self.caller: Caller = NOBODY
        self.tenant: Tenant | None = None
        self.peer = ""
        self.options = _NO_OPTIONS
        self.decode_s = 0.0
        self.reserved_bytes = self.decoded_bytes = self.input_bytes = self.answer_bytes = 0
        self.client = ""
        self.recorded = self.abandoned = self.offloaded_text = self.open_answer = False
        self.offloaded_bytes = 0
        self.served: ServedVersion | None = None
        self.texts: Sequence[Rows] = ()
        self.entry: Entry | None = None
        self.cache_key: bytes | None = None
        self.cache_status = NOT_CACHED
        self.flight: Any = None
        self.leads = False
        self.observation: Any = None
        self.observed: Tensors | None = None
        self.outputs: Tensors | None = None
        self.ended = 0.0
        self.sentences: Any = None

    def free(self) -> None:
        """Drop what the body has become. An idle connection keeps its last request, outside the budget."""
        self.options = _NO_OPTIONS
        self.texts = ()
        self.observation = self.sentences = None
        self.observed = self.outputs = None
        self.cache_key = None
