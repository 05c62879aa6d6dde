"""Lets equal requests that come at once share one run.

The first request of a key is the leader of a flight: its entry runs. Equal requests of the same tenant that
come before its result are followers: their entries wait, and get the same outputs. Each request keeps its own
id, deadline and accounting. If the leader's client disconnects, or its deadline passes, the last follower
becomes the leader, and its entry runs instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from inferpool.errors import DeadlineExceeded, InferpoolError, InternalError
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.response_cache import HIT, MISS, SHARED, CacheKey, VersionCache
from inferpool.http.predict.results import ResultDispatcher
from inferpool.pool.ports import Entry, Inbox, Result, VersionKey

log = logging.getLogger(__name__)


class Follower:
    """A request that waits for the run of another."""

    __slots__ = ("context", "entry", "then")

    def __init__(self, context: PredictContext, entry: Entry, then: Callable[[Result], None]) -> None:
        self.context = context
        self.entry = entry
        self.then = then


class Flight:
    """One run that equal requests wait for.

    Attributes:
        cache: where its outputs are to be kept.
        key: the key of its requests.
        shelf: the tenant, as the cache names it.
        leader: the request whose entry runs, which gets the result first.
        followers: the requests that wait for the same result, by the ids of their entries.
        readers: requests that still read outputs which belong to the leader's entry.
        landed: whether the result has come.
    """

    __slots__ = ("_land", "cache", "followers", "key", "landed", "leader", "readers", "shelf")

    def __init__(
        self,
        cache: VersionCache,
        key: CacheKey,
        shelf: str,
        leader: Follower,
        land: Callable[[Flight, Result], None],
    ) -> None:
        """`land` is called with the flight and the result of the leader's entry."""
        self.cache = cache
        self.key = key
        self.shelf = shelf
        self.leader = leader
        self.followers: dict[int, Follower] | None = None
        self.readers = 0
        self.landed = False
        self._land = land

    def on_result(self, result: Result) -> None:
        """Take the result of the leader's entry."""
        self._land(self, result)


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
        self._land: Callable[[Flight, Result], None] = self.land

    def begin(
        self, cache: VersionCache, context: PredictContext, entry: Entry, then: Callable[[Result], None]
    ) -> Flight | None:
        """Return a new flight whose `on_result` is to get the result of `entry`, which the caller offers.

        None if `then` is called with cached outputs, or those of a run that has begun, without such an offer.
        """
        key = context.cache_key
        assert key is not None  # the caller has looked
        shelf = "" if context.tenant is None else context.tenant.name
        outputs = cache.find(shelf, key)
        if outputs is not None:
            cache.hits.add()
            context.cache_status = HIT
            self._results.subscribe(entry.id, then)
            self._results.put([Result(entry.id, outputs, None, 0.0)])
            return None
        flight: Flight | None = cache.flights.get(key)
        if flight is not None and flight.leader.entry.priority <= entry.priority:
            context.cache_status = SHARED
            context.flight = flight
            self._results.subscribe(entry.id, then)
            if flight.followers is None:
                flight.followers = {}
            flight.followers[entry.id] = Follower(context, entry, then)
            return None
        context.cache_status = MISS
        return Flight(cache, key, shelf, Follower(context, entry, then), self._land)

    def offered(self, flight: Flight) -> None:
        """Let others join a flight: the entry of its leader has been accepted."""
        flight.cache.misses.add()
        flight.cache.flights[flight.key] = flight
        flight.leader.context.flight = flight

    def land(self, flight: Flight, result: Result) -> None:
        """Give the result of a run to the requests that wait for it."""
        leader, followers = flight.leader, flight.followers
        leader.context.flight = None
        if followers and isinstance(result.error, DeadlineExceeded):
            self._promote(flight)  # the deadline was the leader's own
            followers = None
        else:
            self._end(flight)
            flight.landed = True
            outputs = result.outputs
            if outputs is not None:
                flight.cache.keep(flight.shelf, flight.key, outputs)
            if followers:
                flight.cache.shared.add(len(followers))
                now, error = self._clock(), result.error
                flight.readers = 1 + len(followers)
                leader.context.flight = flight
                flight.followers = None
                self._results.put(
                    [
                        Result(entry_id, outputs, error, max(0.0, now - follower.entry.arrived))
                        for entry_id, follower in followers.items()
                    ]
                )
        leader.then(result)

    def expire(self, context: PredictContext, entry: Entry) -> bool:
        """End a follower whose deadline has passed; returns False if the request runs, or is answered."""
        flight: Flight | None = context.flight
        if flight is None or flight.landed or flight.leader.context is context:
            return False
        self._remove(flight, context, entry)
        waited_s = max(0.0, self._clock() - entry.arrived)
        error = DeadlineExceeded("the deadline passed before an equal request had its answer")
        self._results.put([Result(entry.id, None, error, waited_s)])
        return True

    def abandon(self, context: PredictContext, entry: Entry) -> bool:
        """Leave a flight, because the client is gone; returns whether the entry is to be cancelled."""
        flight: Flight | None = context.flight
        assert flight is not None  # the caller has looked
        if flight.landed:
            return False
        if flight.leader.context is not context:
            self._remove(flight, context, entry)
            return False
        context.flight = None
        self._promote(flight)
        return True

    def release(self, context: PredictContext) -> None:
        """Take note that a request does not read the outputs of its flight any more."""
        flight: Flight | None = context.flight
        assert flight is not None  # the caller has looked
        context.flight = None
        flight.readers -= 1
        if not flight.readers and self._release is not None:
            entry = flight.leader.entry
            self._release(entry.key, entry.id)

    def _remove(self, flight: Flight, context: PredictContext, entry: Entry) -> None:
        context.flight = None
        if flight.followers is not None:
            flight.followers.pop(entry.id, None)

    def _end(self, flight: Flight) -> None:
        """Let nobody join a flight any more."""
        flights = flight.cache.flights
        if flights.get(flight.key) is flight:
            del flights[flight.key]

    def _promote(self, flight: Flight) -> None:
        """Run the entry of the last follower; end the flight if there is none whose entry is accepted.

        The deadline of the last one is usually the latest.
        """
        followers = flight.followers
        while followers:
            entry_id, leader = followers.popitem()
            flight.leader = leader
            self._results.subscribe(entry_id, flight.on_result)
            try:
                self._inbox.offer(leader.entry)
            except Exception as error:  # noqa: BLE001 - an entry that is refused fails alone
                self._results.subscribe(entry_id, leader.then)
                leader.context.flight = None
                self._results.put([Result(entry_id, None, _refusal(error), 0.0)])
                continue
            leader.context.cache_status = MISS
            flight.cache.misses.add()
            return
        self._end(flight)


def _refusal(error: Exception) -> InferpoolError:
    if isinstance(error, InferpoolError):
        return error
    log.error("an entry could not be offered", exc_info=error)
    return InternalError("the request could not be queued")
