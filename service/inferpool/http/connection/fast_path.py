"""Requests that need no parser: the head is cached, and the body came with it."""

from __future__ import annotations

from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import Exchange
from inferpool.http.predict.context import PredictContext


def try_cached_head(connection: Connection, data: bytes, now: float) -> bool:
    """Answer the request `data`, received at `now`, if it is complete and its head is cached.

    Returns False, and does nothing, if the parser has to read `data`, or if earlier requests are not answered
    yet.
    """
    if connection.current is not None or not connection.between_requests:
        return False
    found = connection.shared.heads.find(data)
    if found is None:
        return False
    cached, body = found
    began = connection.shared.predictor.clock()
    caller = cached.caller
    if caller.valid_until <= began:
        return False  # the key has expired: the gate refuses it
    connection.last_received = now
    connection.idle_since = None
    connection.unparsed_bytes = 0
    context = PredictContext(cached.api, cached.head, began)
    context.caller = caller
    exchange = Exchange(connection, context, keep_alive=True, expects_100=False)
    connection.last = connection.current = exchange
    exchange.run(body)
    return True
