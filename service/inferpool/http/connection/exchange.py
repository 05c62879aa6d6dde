"""One prediction on a connection: its body is received, its entry runs, its response is written.

An exchange has one state, and moves from state to state through `Exchange._move`. The connection and the
predictor drive it with plain calls, without tasks and events. Each call that comes too late, because the
client is gone or has been refused, finds another state than it expects and does nothing.

An exception in one of these calls ends the exchange: `Exchange._fail` responds with the error, and
`Exchange._break_off` closes the connection if no response can be made or written.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, Final

from inferpool.errors import DeadlineExceeded, InferpoolError
from inferpool.http.access.caller import NOBODY
from inferpool.http.access.gate import is_lasting
from inferpool.http.connection.body_receiver import LEAST_RECEIVED_BYTES
from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange_state import (
    DECODING,
    DONE,
    ENCODING,
    FOLLOWER_BITS,
    QUEUED,
    READING,
    READY,
    STATES,
    WAITING,
    WRITING,
)
from inferpool.http.connection.response_head import response_head, whole_response
from inferpool.http.predict.api import Data
from inferpool.http.predict.body_buffer import BodyBuffer
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.offload import HEAVY_BYTES
from inferpool.http.predict.response import Response, compressed
from inferpool.http.predict.response_cache import NOT_CACHED
from inferpool.pool.ports import Result
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

MOST_DISCARDED_BYTES: Final = 256 * 1024
"""Bytes of the body of a refused request that are read, so that the connection can stay open."""
_JOINED_BYTES: Final = 64 * 1024
"""A response up to this size is written in one piece with its head."""


class Exchange:
    """One request for a prediction, and its response.

    `PredictProtocol` gives exchanges to uvicorn's protocol, which expects its own `RequestResponseCycle` and
    uses two attributes of it: `keep_alive` and `response_complete`. Sharing one pipeline with uvicorn's
    cycles costs less than a second protocol below, which would have to parse each head again to hand a
    connection over.

    Attributes:
        keep_alive: whether the connection stays open after the response.
    """

    __slots__ = (
        "_body", "_connection", "_context", "_error", "_expects_100", "_predictor", "_state", "_timer",
        "keep_alive",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        context: PredictContext,
        keep_alive: bool,
        expects_100: bool,
        error: Exception | None = None,
    ) -> None:
        """`expects_100` says that the client waits for "100 Continue"; `error` is the response if given."""
        self._connection = connection
        self._predictor = connection.shared.predictor
        self._context = context
        context.peer = connection.client
        self._body: BodyBuffer | None = None
        self._error = error
        self._expects_100 = expects_100
        self._timer: asyncio.TimerHandle | None = None
        self._state = WAITING if error is None else READY
        self.keep_alive = keep_alive

    @property
    def response_complete(self) -> bool:
        """Whether the next request may have its turn; the name is uvicorn's."""
        return self._state == DONE

    @property
    def state(self) -> int:
        """The state, `WAITING` to `DONE`."""
        return self._state

    # From the connection.

    def start(self) -> None:
        """Begin the turn of this request: all earlier ones on the connection are answered."""
        if self._state == DONE:
            return  # the client disconnected just before
        try:
            ready = self._state == READY
            if not self._admit(0):
                return
            if ready:
                self._decode(self._finish_body())
            elif self._expects_100:
                self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)

    def run(self, body: bytes) -> None:
        """Begin the turn of a request whose `body` is complete."""
        if self._admit(len(body)):
            self._decode(body)

    def receive(self, size: int, chunk: bytes | None) -> bool:
        """Count `size` bytes of the body: those of `chunk`, or if it is None those written to `memory`.

        Returns whether the rest of the body is of use.
        """
        if self._state != READING and self._state != WAITING:
            return False
        try:
            self._predictor.budget.reserve(self._context, size)
            if chunk is None:
                self._buffer().advance(size)
            else:
                self._buffer().add(chunk)
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._reject(error)
            return False
        return True

    def memory(self) -> memoryview | None:
        """Return memory for the rest of the body, or None if the rest is small or of no use."""
        if self._state != READING:
            return None
        length = self._context.head.content_length or 0
        if length - self._context.reserved_bytes < LEAST_RECEIVED_BYTES:
            return None
        try:
            return self._buffer().remaining()
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._reject(error)
            return None

    def end_body(self) -> None:
        """Take note that the body is complete."""
        if self._state == READING:
            try:
                self._decode(self._finish_body())
            except Exception as error:  # noqa: BLE001 - every error becomes a response
                self._fail(error)
        elif self._state == WAITING:
            self._move(READY)

    def fail(self, error: Exception) -> bool:
        """Respond with `error`, expect no more of the body, and close the connection.

        Returns False, and does nothing, if the rest of the body is of no use anyway.
        """
        if self._state != READING and self._state != WAITING:
            return False
        self.keep_alive = False
        self._reject(error)
        return True

    def remember_head(self, data: bytes, body: bytes) -> None:
        """Cache the head of this request, or its refusal.

        The parser has read all of `data`, and `body` in one piece.
        """
        context, connection, error = self._context, self._connection, self._error
        if not self.keep_alive or self._expects_100:
            return
        if context.head.kept_names is not self._predictor.resolver.choice_headers:
            return  # it lacks a header by which requests are chosen now
        if context.caller is not NOBODY:
            caller = None if context.caller is connection.keyless else context.caller
            connection.shared.heads.remember(data, body, context.api, context.head, caller)
        elif (
            isinstance(error, InferpoolError)
            and is_lasting(error)
            and connection.keyless is connection.shared.gate.anonymous
        ):
            connection.shared.heads.remember_refused(data, body, context.api, context.head, error)

    def sent(self, rest: bytes) -> None:
        """Take note that the response was sent, encrypted if the connection is, except for its `rest`."""
        if self._state != WRITING:
            return
        try:
            if rest:
                tls = self._connection.tls
                if tls is None:
                    self._connection.transport.write(rest)
                else:
                    tls.write_records(rest)
            self._written()
        except Exception as error:  # noqa: BLE001 - every error ends the connection
            self._break_off(error)

    def not_sent(self, error: Exception) -> None:
        """Take note that `error` has ended the writing of the response, maybe in its middle."""
        if self._state == WRITING:
            self._break_off(error)

    def complete(self) -> None:
        """End the turn: the response is written and need not be waited for."""
        if self._state != WRITING:
            return
        try:
            self._end()
            if not self.keep_alive:
                self._connection.close()
            self._connection.completed()
        except Exception as error:  # noqa: BLE001 - every error ends the connection
            self._break_off(error)

    def count_unread(self, size: int) -> None:
        """Take note that `size` bytes of the response are not read yet."""
        self._predictor.budget.shrink_answer(self._context, size)

    def lose(self) -> None:
        """End at once, without a response: the client is gone."""
        if self._state == DONE:
            return
        try:
            self._predictor.abandon(self._context)
        except Exception:
            log.exception("request %s could not be abandoned", self._context.request_id)
        self._end()

    # From the predictor, threads and timers.

    def _submit(self, tensors: Tensors) -> None:
        """Put the entry in the queue."""
        if self._state != DECODING:
            return
        try:
            deadline = self._predictor.submit(
                self._context, tensors, self._on_result, self._connection.client
            )
            self._move(QUEUED)
            if deadline < math.inf:
                self._set_timer(deadline - self._predictor.clock())
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)

    def _on_decoded(self, outcome: Any) -> None:
        """Go on with the tensors, or the error, that a thread has made of the body."""
        try:
            self._predictor.decoded(self._context)
            if self._context.abandoned:
                self._predictor.release(self._context)
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            outcome = error
        if self._state != DECODING:
            return
        if isinstance(outcome, Exception):
            self._fail(outcome)
        else:
            self._submit(outcome)

    def _on_result(self, result: Result) -> None:
        """Respond with the result of the entry."""
        if self._state != QUEUED:
            return
        self._move(ENCODING)
        context = self._context
        try:
            if context.leads:
                self._predictor.land(context, result)
            if context.answer_bytes or context.open_answer:
                threads = self._predictor.large_answers.weigh(context, result, self._connection.client)
                if threads is not None:
                    self._connection.run_in_thread(
                        self._predictor.large_answers.encode,
                        context,
                        result,
                        then=self._on_encoded,
                        threads=threads,
                    )
                    return
            response = self._predictor.encode(context, result)
            if response.compressible:
                if response.size > HEAVY_BYTES:
                    self._connection.run_in_thread(compressed, response, then=self._on_compressed)
                    return
                response = compressed(response)
            self._write(response)
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)

    def _on_encoded(self, outcome: Any) -> None:
        """Write the large answer, or the error, that a thread has made."""
        predictor, context = self._predictor, self._context
        try:
            predictor.offloader.end(context)
            if context.abandoned:
                predictor.release(context)
            if self._state != ENCODING:
                return
            if isinstance(outcome, Exception):
                raise outcome
            self._write(predictor.respond(context, outcome))
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)

    def _on_compressed(self, outcome: Any) -> None:
        """Write the response, or the error, that a thread has made."""
        if self._state != ENCODING:
            return
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._write(outcome)
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)

    def _on_deadline(self) -> None:
        """Give up what has not run yet."""
        if self._state == DECODING:
            self._fail(DeadlineExceeded("the deadline passed while the body was decoded"))
        elif self._state == QUEUED:
            try:
                self._predictor.expire(self._context)
            except Exception as error:  # noqa: BLE001 - every error becomes a response
                self._fail(error)

    # The steps.

    def _move(self, to: int) -> None:
        """Enter the state `to`; the timer of the state before is cancelled."""
        if not FOLLOWER_BITS[self._state] & (1 << to):
            raise RuntimeError(f"an exchange cannot go from {STATES[self._state]} to {STATES[to]}")
        self._state = to
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _admit(self, size: int) -> bool:
        """Begin the turn, and reserve `size` bytes of body; returns False if the request is refused."""
        predictor = self._predictor
        self._move(READING)
        predictor.in_flight.requests += 1
        if self._error is not None:
            # Before every other reason: a stranger must not learn which models there are.
            self._fail(self._error)
            return False
        try:
            predictor.admit(self._context, size)
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)
            return False
        return True

    def _buffer(self) -> BodyBuffer:
        if self._body is None:
            predictor = self._predictor
            heap_bytes = predictor.budget.heap_bytes // max(1, predictor.in_flight.requests)
            lent = predictor.lend_body(self._context)
            self._body = BodyBuffer(self._context.head, predictor.max_body_bytes, heap_bytes, lent)
        return self._body

    def _finish_body(self) -> Data:
        body, self._body = self._body, None
        return b"" if body is None else body.finish()

    def _reject(self, error: Exception) -> None:
        """Respond with `error` as soon as it is this request's turn, and receive no more of its body."""
        if self._state == READING:
            self._fail(error)
        else:
            # Without its traceback, whose frames refer to this exchange: a cycle would keep the head, of up
            # to 64 KiB, until the garbage collector runs.
            self._error = error.with_traceback(None)
            self._body = None
            self._move(READY)

    def _decode(self, data: Data) -> None:
        self._move(DECODING)
        predictor, context = self._predictor, self._context
        try:
            if predictor.offloader.is_heavy(context, data):
                self._decode_in_thread(data)
                return
            tensors = predictor.decode(context, data)
        except Exception as error:  # noqa: BLE001 - every error becomes a response
            self._fail(error)
            return
        # Not at once, but after all connections have been read: an idle instance then takes the requests of
        # one iteration of the loop in one batch.
        self._connection.shared.deferred.defer(self._connection.loop, self._submit, tensors)

    def _decode_in_thread(self, data: Data) -> None:
        predictor, context = self._predictor, self._context
        deadline = predictor.deadline(context)
        left_s = deadline - predictor.clock()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed before the body was complete")
        threads = predictor.offloader.begin(context, len(data), self._connection.client)
        if deadline < math.inf:
            self._set_timer(left_s)
        self._connection.run_in_thread(
            predictor.decode, context, data, then=self._on_decoded, threads=threads
        )

    def _set_timer(self, left_s: float) -> None:
        self._timer = self._connection.loop.call_later(max(0.0, left_s), self._on_deadline)

    def _fail(self, error: Exception) -> None:
        """Respond with `error`, or close the connection if a response has begun or cannot be made."""
        state = self._state
        if state < READING or state > ENCODING:
            self._break_off(error)
            return
        try:
            if state == READING:
                self._spare_body()
            response = self._predictor.refuse(self._context, error)
            if state == QUEUED:
                self._predictor.abandon(self._context)
                self._move(ENCODING)
            self._write(response)
        except Exception as fault:  # noqa: BLE001 - the error must not leave the client without an end
            self._break_off(fault)

    def _break_off(self, error: Exception) -> None:
        """Close the connection at once: `error` leaves no response to this request, or a part of one."""
        context = self._context
        log.error("request %s failed, and its connection is closed", context.request_id, exc_info=error)
        try:
            if self._state != DONE:
                self._predictor.broke_off(context)
                self.lose()
        except Exception:
            log.exception("what request %s holds could not be released", context.request_id)
        self._connection.transport.abort()

    def _spare_body(self) -> None:
        """Read no more of the body if much of it is still to come, and close the connection instead."""
        connection = self._connection
        if connection.between_requests or connection.last is not self or connection.owner is None:
            return  # the body is complete
        missing = (self._context.head.content_length or 0) - self._context.reserved_bytes
        if missing > MOST_DISCARDED_BYTES:
            self.keep_alive = False
            connection.owner.stop_reading()

    def _write(self, response: Response) -> None:
        connection = self._connection
        transport, shared = connection.transport, connection.shared
        if transport.is_closing():
            self.lose()
            return
        if self._predictor.in_flight.closing and not connection.has_more_requests():
            self.keep_alive = False
        self._move(WRITING)
        cached = self._context.cache_status if response.status == 200 else NOT_CACHED
        prefix = shared.prefix.of(response.status, connection.default_headers(), cached)
        headers = response.headers
        if shared.cors is not None:
            headers = [*headers, *shared.cors.headers(self._context.head.origin)]
        if response.size > _JOINED_BYTES:
            transport.write(response_head(prefix, headers, not self.keep_alive, response.size))
            lent = self._predictor.lends_outputs
            for part in response.parts:
                # A transport keeps what the socket does not take at once. A view of memory that an engine
                # shares must not stay there, because the memory is used for others after `release`.
                transport.write(bytes(part) if lent and not isinstance(part, bytes) else part)
            self._written()
            return
        data = whole_response(prefix, headers, not self.keep_alive, response.size, response.parts)
        if shared.writes.collecting and connection.descriptor >= 0 and not transport.get_write_buffer_size():
            tls = connection.tls
            shared.writes.add(connection.descriptor, data if tls is None else tls.encrypt(data), self)
        else:
            transport.write(data)
            self._written()

    def _written(self) -> None:
        connection = self._connection
        if connection.write_paused:
            unread = connection.transport.get_write_buffer_size()
            self._predictor.release(self._context)
            self._predictor.budget.hold(self._context, unread, connection.client)
            connection.hold(self)
        else:
            self.complete()

    def _end(self) -> None:
        had_turn = self._state >= READING
        self._move(DONE)
        self._body = None  # the connection keeps its last exchange
        if had_turn:
            self._predictor.in_flight.leave()
        self._predictor.release(self._context)
