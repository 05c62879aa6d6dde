"""Requests that need no parser: the head is cached, and the body came with it."""

from __future__ import annotations

from inferpool.http.access.caller import PREDICT
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
        return _try_refused_head(connection, data, now)
    cached, body = found
    began = connection.shared.predictor.clock()
    caller = cached.caller
    if caller is None:
        # The gate has judged another connection's caller, who may have had other rights.
        caller = connection.keyless
        model = cached.head.model
        if not caller.scopes & PREDICT or (model is not None and not caller.may_predict(model)):
            return False
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


def _try_refused_head(connection: Connection, data: bytes, now: float) -> bool:
    """Refuse the request `data` if it is complete, and one like it was refused before for its key.

    A request with another key than the refused one is refused as well if the server does not know this key.
    """
    shared = connection.shared
    found = shared.heads.find_refused(data)
    if found is None or connection.keyless is not shared.gate.anonymous:
        return False
    refused, secret = found
    if secret is not None and shared.gate.may_know(secret):
        return False
    connection.last_received = now
    connection.idle_since = None
    connection.unparsed_bytes = 0
    shared.gate.count_refusal(refused.error, connection.client, refused.head.forwarded, "")
    context = PredictContext(refused.api, refused.head, shared.predictor.clock())
    exchange = Exchange(connection, context, keep_alive=True, expects_100=False, error=refused.error)
    connection.last = connection.current = exchange
    exchange.start()
    return True
