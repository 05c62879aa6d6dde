"""The objects that all connections of one event loop share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from inferpool.http.access.cors import CorsPolicy
from inferpool.http.access.gate import Gate
from inferpool.http.connection.batched_writes import WriteBatcher
from inferpool.http.connection.deferred_calls import DeferredCalls
from inferpool.http.connection.head_cache import HeadCache
from inferpool.http.connection.head_fault import HeadChecker
from inferpool.http.connection.response_head import ResponsePrefix
from inferpool.http.connection.unread_responses import UnreadResponses
from inferpool.http.predict.predictor import Predictor
from inferpool.pool.log_limits import LogLimiter

MOST_HEAD_BYTES: Final = 64 * 1024
"""Bytes of a request line and headers, unless the settings say otherwise."""


class SharedState:
    """The objects that the exchanges of all connections use.

    Attributes:
        predictor: answers predictions.
        gate: knows the keys.
        heads: request heads that have been parsed before.
        head_checker: refuses heads that are invalid although the parser takes them.
        deferred: calls to make at the end of the loop's iteration.
        prefix: the first lines of responses.
        unread: the connections whose clients leave responses unread.
        writes: collects the responses of one batch.
        most_head_bytes: a request line and headers with more bytes are refused.
        root_path: the path below which a proxy offers the server, without a slash at its end.
        log_limiter: limits the lines about clients that are refused.
        cors: which web pages may read responses; None if no page of another origin may.
        aliases: other paths of routes, by which they are asked for.
    """

    __slots__ = (
        "aliases", "cors", "deferred", "gate", "head_checker", "heads", "log_limiter", "most_head_bytes",
        "predictor", "prefix", "root_path", "unread", "writes",
    )  # fmt: skip

    def __init__(
        self,
        predictor: Predictor,
        gate: Gate,
        cors: CorsPolicy | None = None,
        most_head_bytes: int = MOST_HEAD_BYTES,
        root_path: str = "",
        aliases: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.predictor = predictor
        self.gate = gate
        self.heads = HeadCache()
        self.head_checker = HeadChecker()
        gate.on_change(self.heads.clear)
        predictor.resolver.on_choice_headers = self.heads.clear
        self.deferred = DeferredCalls()
        self.prefix = ResponsePrefix()
        self.unread = UnreadResponses(predictor.budget)
        self.writes = WriteBatcher()
        self.log_limiter = LogLimiter(predictor.clock)
        self.most_head_bytes = most_head_bytes
        self.root_path = root_path.encode()
        self.cors = cors
        self.aliases = aliases or {}
