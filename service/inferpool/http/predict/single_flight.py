"""Lets equal requests that come at once share one run.

The first request of a key is the leader: its entry runs. Equal requests of the same tenant that come before
its result are followers: their entries wait, and get the same outputs. Each request keeps its own id,
deadline and accounting. If the leader's client disconnects, or its deadline passes, a follower becomes the
leader, and its entry runs instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from inferpool.errors import DeadlineExceeded, InferpoolError, InternalError
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.response_cache import HIT, MISS, SHARED, VersionCache
from inferpool.http.predict.results import ResultDispatcher
from inferpool.pool.ports import Entry, Inbox, Result, VersionKey

log = logging.getLogger(__name__)


class Flight:
    """A run that several requests wait for.

    Attributes:
        followers: the requests beside the leader, by the ids of their entries; none once there is a result.
        lender: the entry to which the outputs belong, once they are there.
        readers: requests that still read these outputs.
    """

    __slots__ = ("followers", "lender", "readers")

    def __init__(self) -> None:
        self.followers: dict[int, PredictContext] = {}
        self.lender: Entry | None = None
        self.readers = 0


class SingleFlight:
    """Finds answers in the cache, and joins equal requests. For the event loop alone."""

    def __init__(
        self,
        inbox: Inbox,
        results: ResultDispatcher,
        clock: Callable[[], float],
        release: Callable[[VersionKey, int], None] | None,
    ) -> None:
        """`release` is called with the entry whose outputs nobody reads any more; None if none is needed."""
        self._inbox = inbox
        self._results = results
        self._clock = clock
        self._release = release

    def join(
        self, cache: VersionCache, context: PredictContext, entry: Entry, then: Callable[[Result], None]
    ) -> bool:
        """Return whether `then` is called with cached outputs, or with those of a run that has begun.

        Otherwise others may join the request from now on. The caller offers `entry`, and then calls `lead`,
        or `withdraw` if it is refused.
        """
        key = context.cache_key
        assert key is not None  # the caller has looked
        outputs = cache.find(key)
        if outputs is not None:
            cache.hits.add()
            context.cache_status = HIT
            self._results.subscribe(entry.id, then)
            self._results.put([Result(entry.id, outputs, None, 0.0)])
            return True
        leader: PredictContext = cache.flights.setdefault(key, context)
        if leader is context:
            return False
        if leader.entry is None or leader.entry.priority > entry.priority:
            cache.flights[key] = context
            return False
        flight: Flight | None = leader.flight
        if flight is None:
            flight = leader.flight = Flight()
        context.cache_status = SHARED
        context.flight = flight
        flight.followers[entry.id] = context
        self._results.subscribe(entry.id, then)
        return True

    def lead(self, cache: VersionCache, context: PredictContext) -> None:
        """Take note that the entry of a request has been accepted; `land` is called with its result."""
        cache.misses.add()
        context.cache_status = MISS
        context.leads = True

    def withdraw(self, cache: VersionCache, context: PredictContext) -> None:
        """Let nobody join a request whose entry has been refused."""
        key = context.cache_key
        assert key is not None  # the caller has looked
        if cache.flights.get(key) is context:
            del cache.flights[key]

    def land(self, context: PredictContext, result: Result) -> None:
        """Take the result of a leader, before it is encoded, and give it to the followers.

        If that fails, the leader is answered all the same, and followers without a result get an error.
        """
        try:
            self._land(context, result)
        except Exception:
            log.exception("the answer of request %s could not be shared", context.request_id)
            self._end_followers(context)

    def _end_followers(self, context: PredictContext) -> None:
        flight: Flight | None = context.flight
        served, key = context.served, context.cache_key
        cache = None if served is None else served.cache
        if cache is not None and key is not None and cache.flights.get(key) is context:
            del cache.flights[key]
        if flight is None or flight.lender is not None:
            return
        context.flight = None
        followers, flight.followers = flight.followers, {}
        failed: list[Result] = []
        for entry_id, follower in followers.items():
            follower.flight = None
            failed.append(Result(entry_id, None, InternalError("the answer could not be shared"), 0.0))
        self._results.put(failed)

    def _land(self, context: PredictContext, result: Result) -> None:
        flight: Flight | None = context.flight
        context.leads = False
        followers = None if flight is None else flight.followers
        if followers and isinstance(result.error, DeadlineExceeded):
            self._promote(context)  # the deadline was the leader's own
            return
        key, served, entry, outputs = context.cache_key, context.served, context.entry, result.outputs
        assert key is not None  # leaders have a key, a version and an entry
        assert served is not None
        assert entry is not None
        cache = served.cache
        assert cache is not None
        leader = cache.flights.pop(key, None)
        if leader is not context and leader is not None:
            cache.flights[key] = leader  # one of higher priority, which came later
        if outputs is not None:
            shelf = "" if context.tenant is None else context.tenant.name
            try:
                cache.keep(shelf, key, outputs, again=bool(followers))
            except Exception:
                # The outputs are sent all the same.
                log.warning("an answer could not be cached", exc_info=True)
        if flight is None or not followers:
            context.flight = None
            return
        cache.shared.add(len(followers))
        now, error = self._clock(), result.error
        shared: list[Result] = []
        for entry_id, follower in followers.items():
            began = now if follower.entry is None else follower.entry.arrived
            shared.append(Result(entry_id, outputs, error, max(0.0, now - began)))
        flight.lender = entry
        flight.readers = 1 + len(followers)
        flight.followers = {}
        self._results.put(shared)

    def expire(self, context: PredictContext, entry: Entry) -> bool:
        """End a follower whose deadline has passed; returns False if the request runs, or is answered."""
        flight: Flight | None = context.flight
        if context.leads or flight is None or flight.lender is not None:
            return False
        context.flight = None
        flight.followers.pop(entry.id, None)
        waited_s = max(0.0, self._clock() - entry.arrived)
        error = DeadlineExceeded("the deadline passed before an equal request had its answer")
        self._results.put([Result(entry.id, None, error, waited_s)])
        return True

    def abandon(self, context: PredictContext, entry: Entry) -> bool:
        """Take note that the client of a request is gone; returns whether its entry is to be cancelled."""
        if context.leads:
            context.leads = False
            self._promote(context)
            return True
        flight: Flight | None = context.flight
        if flight is None or flight.lender is not None:
            return flight is None
        context.flight = None
        flight.followers.pop(entry.id, None)
        return False

    def release(self, context: PredictContext) -> None:
        """Take note that a request does not read the outputs of its flight any more."""
        flight: Flight | None = context.flight
        assert flight is not None  # the caller has looked
        context.flight = None
        flight.readers -= 1
        lender = flight.lender
        if not flight.readers and self._release is not None and lender is not None:
            self._release(lender.key, lender.id)

    def _promote(self, context: PredictContext) -> None:
        """Run the entry of the last follower of a leader that leaves; go on until an entry is accepted.

        The deadline of the last one is usually the latest.
        """
        flight: Flight | None = context.flight
        key, served = context.cache_key, context.served
        context.flight = None
        assert key is not None  # leaders have a key and a version
        assert served is not None
        cache = served.cache
        assert cache is not None
        leads = cache.flights.get(key) is context  # else there is a leader of higher priority
        while flight is not None and flight.followers:
            entry_id, follower = flight.followers.popitem()
            entry = follower.entry
            assert entry is not None  # followers have one from the beginning
            try:
                self._inbox.offer(entry)
            except Exception as error:  # noqa: BLE001 - an entry that is refused fails alone
                follower.flight = None
                self._results.put([Result(entry_id, None, _refusal(error), 0.0)])
                continue
            follower.leads = True
            follower.cache_status = MISS
            cache.misses.add()
            if leads:
                cache.flights[key] = follower
            return
        if leads:
            del cache.flights[key]


def _refusal(error: Exception) -> InferpoolError:
    if isinstance(error, InferpoolError):
        return error
    log.error("an entry could not be offered", exc_info=error)
    return InternalError("the request could not be queued")
