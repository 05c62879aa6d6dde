"""One prediction on a connection: its body comes in, its entry runs, its answer goes out.

A small state machine that its connection drives: no task, no events and no copies of the body but the one
into place.
"""

from __future__ import annotations

from typing import Any, Final

from inferpool.errors import DeadlineExceeded, InferpoolError
from inferpool.http.connection.body_receiver import LEAST_FILLED
from inferpool.http.connection.connection import Connection
from inferpool.http.connection.response_head import response_head
from inferpool.http.predict.api import Data
from inferpool.http.predict.body_buffer import BodyBuffer
from inferpool.http.predict.context import PredictContext, Response, compressed
from inferpool.http.predict.offload import HEAVY_BYTES
from inferpool.pool.ports import Result

_JOINED_BYTES: Final = 64 * 1024
"""An answer up to this size is written with its head, in one piece."""


class Exchange:
    """One prediction.

    It stands where uvicorn's protocol expects its `RequestResponseCycle`, of which it has what that protocol
    touches: `response_complete`, `keep_alive`, `disconnected` and `message_event`.
    """

    __slots__ = (
        "_body_complete", "_call", "_entered", "_fault", "_intake", "_link", "_predictor", "_started",
        "_waits_for_100", "disconnected", "keep_alive", "message_event", "response_complete",
    )  # fmt: skip

    def __init__(
        self,
        link: Connection,
        call: PredictContext,
        keep_alive: bool,
        expects_100: bool,
        fault: Exception | None = None,
    ) -> None:
        self._link = link
        self._predictor = link.predictor
        self._call = call
        self._intake: BodyBuffer | None = None
        self._started = self._entered = self._body_complete = False
        self._fault = fault
        self._waits_for_100 = expects_100
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NEVER_AWAITED

    def start(self) -> None:
        """It is this request's turn on its connection."""
        if self.response_complete:
            return  # the client went while the turn was coming
        self._started = self._entered = True
        self._predictor.enter()
        try:
            self._predictor.admit(self._call)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            # The body may still come, and is of no interest. The traceback has this very exchange in it: a
            # circle that would keep the head, which may be of 64 KiB, until the collector comes.
            self._fault = error.with_traceback(None)
        if self._fault is not None:
            self._refuse(self._fault)
        elif self._body_complete:
            self._read()
        elif self._waits_for_100:
            self._link.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def take(self, chunk: bytes) -> None:
        """The next chunk of the body; ignored where the request is refused already."""
        if self.response_complete or self._fault is not None:
            return
        try:
            self._predictor.reserve(self._call, len(chunk))
            if self._intake is None:
                self._intake = BodyBuffer(self._call.head, self._predictor.max_body_bytes)
            self._intake.add(chunk)
        except InferpoolError as error:
            self._fault = error.with_traceback(None)
            if self._started:
                self._refuse(error)

    def room(self) -> memoryview | None:
        """Where the rest of the body goes, if it is so much that it had better be read into its place."""
        length = self._call.head.content_length or 0
        if not self._started or self._fault is not None or self.response_complete:
            return None
        if length - self._call.reserved_bytes < LEAST_FILLED:
            return None
        if self._intake is None:
            self._intake = BodyBuffer(self._call.head, self._predictor.max_body_bytes)
        return self._intake.rest()

    def came(self, size: int) -> bool:
        """`size` bytes more are in the room; whether the others are still of use."""
        if self.response_complete or self._fault is not None or self._intake is None:
            return False
        try:
            self._predictor.reserve(self._call, size)
        except InferpoolError as error:
            self._fault = error.with_traceback(None)
            self._refuse(error)
            return False
        self._intake.came(size)
        return True

    def taken(self) -> None:
        """The body is complete."""
        self._body_complete = True
        if self._started and self._fault is None and not self.response_complete:
            self._read()

    def run(self, body: bytes) -> None:
        """It is this request's turn, and its body is there."""
        self._started = self._entered = self._body_complete = True
        predictor, call = self._predictor, self._call
        predictor.enter()
        try:
            predictor.admit(call)
            predictor.reserve(call, len(body))
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)
            return
        self._read_whole(body)

    def fail(self, error: Exception) -> None:
        """Answer with `error`, and wait for no more of the body."""
        self._fault = error
        self.keep_alive = False
        self._refuse(error)

    def teach(self, data: bytes, body: bytes) -> None:
        """Remember the head of this request: it was all of `data`, whose body the parser took for `body`."""
        if self.keep_alive and not self._waits_for_100:
            self._predictor.heads.learn(data, body, self._call.api, self._call.head)

    def lose(self) -> None:
        """The client has gone."""
        if self.response_complete:
            return
        self.response_complete = self.disconnected = True
        self._predictor.drop(self._call)
        self._predictor.end(self._call)
        self._leave()

    def complete(self) -> None:
        """The answer is with the transport: the next request may have its turn."""
        if self.response_complete:
            return
        self.response_complete = True
        self._leave()
        if not self.keep_alive:
            self._link.transport.close()
        self._link.completed()

    def _read(self) -> None:
        intake, self._intake = self._intake, None
        self._read_whole(b"" if intake is None else intake.whole())

    def _read_whole(self, data: Data) -> None:
        predictor, call = self._predictor, self._call
        try:
            if predictor.is_heavy(call, data):
                threads = predictor.set_aside(call, len(data), self._expire)
                self._link.run_aside(predictor.read, call, data, then=self._read_aside, threads=threads)
                return
            tensors = predictor.read(call, data)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)
            return
        # Not at once, but when every connection that has something to read has been read: the requests
        # of one round of the loop are offered together, so that an idle instance takes them together.
        predictor.turn.at_end(self._link.loop, self._offer, tensors)

    def _expire(self) -> None:
        self._refuse(DeadlineExceeded("the deadline passed before the body was read"))

    def _read_aside(self, tensors: Any) -> None:
        if self._predictor.taken_back(self._call):
            self._offer(tensors)

    def _offer(self, tensors: Any) -> None:
        if self.disconnected:
            return
        if isinstance(tensors, Exception):
            self._refuse(tensors)
            return
        try:
            self._predictor.offer(self._call, tensors, self._answer)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)

    def _answer(self, result: Result) -> None:
        if self.disconnected:
            return
        self._predictor.end(self._call)
        try:
            answer = self._predictor.answer(self._call, result)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)
            return
        if not answer.compressible:
            self._write(answer)
        elif answer.size > HEAVY_BYTES:
            self._link.run_aside(compressed, answer, then=self._packed)
        else:
            self._write(compressed(answer))

    def _packed(self, answer: Any) -> None:
        if isinstance(answer, Exception):
            self._refuse(answer)
        else:
            self._write(answer)

    def _refuse(self, error: Exception) -> None:
        self._predictor.end(self._call)
        self._write(self._predictor.refusal(self._call, error))

    def _write(self, answer: Response) -> None:
        link = self._link
        if self.disconnected or link.transport.is_closing():
            self.lose()
            return
        if self._predictor.parting and not link.follows():
            self.keep_alive = False
        opening = self._predictor.preamble.of(answer.status, link.headers())
        head = response_head(opening, answer.headers, not self.keep_alive, answer.size)
        if answer.size > _JOINED_BYTES:
            link.transport.write(head)
            for part in answer.parts:
                link.transport.write(part)
            self._written()
            return
        whole = b"".join((head, *answer.parts))
        volley = self._predictor.volley
        if volley.loading and link.descriptor >= 0 and not link.transport.get_write_buffer_size():
            volley.add(link.descriptor, whole, self)
        else:
            self.sent(whole)

    def sent(self, left: bytes) -> None:
        """The answer is on its way, but for what is `left` of it."""
        if left:
            self._link.transport.write(left)
        self._written()

    def _written(self) -> None:
        link = self._link
        self._predictor.answered(self._call)
        if link.write_paused:
            self._predictor.keep(self._call, link.transport.get_write_buffer_size())
            link.hold(self)
        else:
            self.complete()

    def _leave(self) -> None:
        self._intake = None  # the connection keeps its last exchange
        if self._entered:
            self._entered = False
            self._predictor.leave(self._call)
        else:
            self._predictor.answered(self._call)


def try_cached_head(link: Connection, data: bytes, now: float) -> bool:
    """Answer the request `data`, which has come at `now`, if it is a whole one whose head is known.

    False where it is not, or where it is not its turn: that is the parser's then.
    """
    before = link.cycle
    if not link.between or (before is not None and not before.response_complete):
        return False
    predictor = link.predictor
    found = predictor.heads.find(data)
    if found is None:
        return False
    known, body = found
    link.heard = now
    link.idle_since = None
    link.quiet_bytes = 0
    call = PredictContext(known.api, known.head, predictor.clock())
    exchange = Exchange(link, call, keep_alive=True, expects_100=False)
    link.cycle = link.answered = exchange
    exchange.run(body)
    return True


class _NeverAwaited:
    """Stands for the event on which uvicorn's own cycles wait; nobody waits on this one."""

    def set(self) -> None:
        """There is nobody to wake."""


_NEVER_AWAITED: Final = _NeverAwaited()
