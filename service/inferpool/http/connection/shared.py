"""The objects that all connections of one event loop share."""

from __future__ import annotations

from inferpool.http.access.cors import CorsPolicy
from inferpool.http.access.gate import Gate
from inferpool.http.connection.batched_writes import WriteBatcher
from inferpool.http.connection.deferred_calls import DeferredCalls
from inferpool.http.connection.head_cache import HeadCache
from inferpool.http.connection.response_head import ResponsePrefix
from inferpool.http.connection.unread_responses import UnreadResponses
from inferpool.http.predict.predictor import Predictor


class SharedState:
    """The objects that the exchanges of all connections use.

    Attributes:
        predictor: answers predictions.
        gate: knows the keys.
        heads: request heads that have been parsed before.
        deferred: calls to make at the end of the loop's iteration.
        prefix: the first lines of responses.
        unread: the connections whose clients leave responses unread.
        writes: collects the responses of one batch.
        cors: which web pages may read responses; None if no page of another origin may.
    """

    __slots__ = ("cors", "deferred", "gate", "heads", "predictor", "prefix", "unread", "writes")

    def __init__(self, predictor: Predictor, gate: Gate, cors: CorsPolicy | None = None) -> None:
        self.predictor = predictor
        self.gate = gate
        self.heads = HeadCache()
        gate.on_change(self.heads.clear)
        self.deferred = DeferredCalls()
        self.prefix = ResponsePrefix()
        self.unread = UnreadResponses(predictor.budget)
        self.writes = WriteBatcher()
        self.cors = cors
