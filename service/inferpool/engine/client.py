"""The web process's end of a channel to an engine: entries go out, results come in, crashes are replayed.

What goes out is in `entry_sender`, what comes in in `result_receiver`, and the memory of both in
`entry_blocks`. This module knows the life of engines, and which of them has a version.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from inferpool.engine.entry_blocks import EntryBlocks
from inferpool.engine.entry_sender import EntrySender
from inferpool.engine.event_loop import Loop
from inferpool.engine.full_queues import FullQueues
from inferpool.engine.pending_entry import PendingEntry
from inferpool.engine.questions import Questions
from inferpool.engine.records import MOST_ID, hello
from inferpool.engine.result_receiver import ResultReceiver
from inferpool.errors import DeadlineExceeded, InferpoolError, ModelCrashed, NotReady, Overloaded
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry, Result, VersionKey

MOST_ENTRIES: Final = 65_536
"""Entries that may be without their result at a time."""
MOST_CRASHES: Final = 2
"""An entry that has run in so many engines when they crashed is not sent again."""


class Results(Protocol):
    """Takes results on the event loop; `inferpool.http.predict.results.ResultDispatcher` does."""

    def put(self, results: Sequence[Result]) -> None:
        """Deliver results soon, not within this call."""

    def deliver(self, results: Sequence[Result]) -> None:
        """Deliver results now."""


class Suspects(NamedTuple):
    """The versions that may have ended an engine.

    Attributes:
        running: those with entries that were running.
        confirmed: those with an entry that was running when an earlier engine ended, too, and ran alone here.
    """

    running: list[VersionKey]
    confirmed: list[VersionKey]


class EngineClient:
    """Sends entries to one engine and delivers their results. All calls on the event loop's thread.

    An engine may end, and be followed by another one with a higher epoch. Entries without a result are sent
    to the successor: those that waited as they are, those that ran alone. An entry that was running in two
    engines when they ended gets ModelCrashed. Entries that are offered while there is no engine wait for it.

    Life: `attach` when an engine is ready to run entries, `detach` when it is dead, again and again; `close`
    at the end. `expect` comes first if the engine is being restarted when the web process starts.
    """

    def __init__(
        self,
        results: Results,
        loop: Loop,
        clock: Callable[[], float],
        web: int,
        lost: Callable[[int, str], None],
        refused: Callable[[], None],
        most_entries: int = MOST_ENTRIES,
        metrics: Metrics | None = None,
    ) -> None:
        """`web` is the number of this web process. Results go to `results`. At most `most_entries`
        entries are without their result at a time.

        Entries that are sent again or crash an engine twice are counted in `metrics`.

        `lost` is called with the epoch and a reason if the channel breaks: the engine is dead, or has sent
        what is no record. The client then uses the channel no more, and waits for `detach`.

        `refused` is called if the engine lacks the version of an entry; a call of `reroute` must follow, once
        all that is known about versions has been taken note of.
        """
        self._results = results
        self._loop = loop
        self._clock = clock
        self._web = web
        self._lost = lost
        self._most_entries = most_entries
        self._metrics = metrics
        self._closed = False
        self._blocks = EntryBlocks(loop)
        self._pending = self._blocks.pending
        self._full = FullQueues()
        self._questions = Questions()
        self._sender = EntrySender(loop, self._break, metrics)
        self._receiver = ResultReceiver(
            web, loop, clock, self._blocks, self._sender, self._full, self._questions, refused
        )

    # The engine comes and goes.

    @property
    def epoch(self) -> int:
        """The epoch of the engine that entries are sent to; 0 if there is none."""
        return self._sender.epoch if self._sender.channel is not None else 0

    @property
    def is_attached(self) -> bool:
        """Whether there is an engine that entries are sent to."""
        return self._sender.channel is not None

    @property
    def rows(self) -> int:
        """The rows of the entries that have not ended."""
        return self._blocks.rows

    def has_lent(self, entry: Entry) -> bool:
        """Whether the inputs of an entry lie in memory that `lend` has returned."""
        return self._blocks.has_lent(entry)

    @property
    def is_over(self) -> bool:
        """Whether the client is closed, and nobody reads outputs in its arena."""
        return self._closed and not self._blocks.held

    @property
    def unanswered(self) -> int:
        """How many entries have no result yet."""
        return sum(1 for pending in self._pending.values() if pending.wanted)

    def expect(self, arena: int) -> None:
        """Keep entries for an engine that is being started, whose `attach` will follow.

        `arena` is the descriptor of the arena, which the client closes. Raises ValueError if it is another
        one than before.
        """
        self._blocks.map(arena)

    def attach(self, epoch: int, channel: socket.socket, arena: int) -> None:
        """Send entries to the engine at the other end of `channel` from now on, first those without a result.

        Call this when the engine can run the versions, because it refuses entries of others. `arena` is the
        descriptor of the arena, always the same one. The client closes `channel` and `arena`.

        Raises ValueError if an engine is attached, the epoch is not new, or the arena is another one.
        """
        sender = self._sender
        try:
            self._blocks.map(arena)
            if sender.channel is not None:
                raise ValueError(f"the engine of epoch {sender.epoch} is still attached")
            if epoch <= sender.epoch:
                raise ValueError(f"an engine of epoch {epoch} after one of epoch {sender.epoch}")
        except BaseException:
            channel.close()
            raise
        mapped = self._blocks.arena
        assert mapped is not None  # as mapped above
        channel.setblocking(False)
        self._receiver.connect(epoch)
        sender.connect(channel, epoch, hello(self._web, epoch, mapped.size))
        self._loop.add_reader(channel.fileno(), self._readable)
        for pending in list(self._pending.values()):
            if pending.wanted:
                pending.refusal = None
                self._blocks.mark_waiting(pending)
                sender.offer(pending)
        sender.plan_flush()

    def detach(self, epoch: int, *, blame: bool = True) -> Suspects:
        """Take note that the engine of `epoch` is dead: it uses the arena no more.

        Running entries are suspects: they will run alone. Returns their versions.
        Unless `blame`, something else is known to have ended the engine.
        """
        blocks = self._blocks
        if epoch != self._sender.epoch:
            return Suspects([], [])
        self._disconnect()
        versions: dict[VersionKey, None] = {}
        confirmed: dict[VersionKey, None] = {}
        crashed: list[Result] = []
        for entry_id, pending in list(self._pending.items()):
            blocks.take_back(pending)
            ran = blocks.has_run(pending)
            pending.accepted = pending.accepted or pending.sent
            pending.sent = False
            if ran and not pending.runs_on:
                versions[pending.entry.key] = None
                if blame:
                    pending.crashes += 1
                    if pending.crashes >= MOST_CRASHES:
                        confirmed[pending.entry.key] = None
            if not pending.wanted:
                blocks.free(entry_id, pending)
            elif pending.crashes >= MOST_CRASHES:
                pending.log_crash()
                pending.count(self._metrics, "crashed_entries_total")
                error = ModelCrashed("the model's process ended on this request, twice")
                crashed.append(self._local_result(pending, error))
                blocks.free(entry_id, pending)
        if crashed:
            self._results.put(crashed)
        self._full.clear()
        return Suspects(list(versions), list(confirmed))

    def give_up(self, error: Callable[[], InferpoolError]) -> None:
        """Answer every entry with an error, because no engine will come. None may be attached."""
        if self._sender.channel is not None or any(pending.sent for pending in self._pending.values()):
            raise ValueError(f"the engine of epoch {self._sender.epoch} is still attached")
        results: list[Result] = []
        for entry_id, pending in list(self._pending.items()):
            if pending.wanted:
                results.append(self._local_result(pending, error()))
            self._blocks.free(entry_id, pending)
        if results:
            self._results.put(results)

    def reroute(self, clients: Mapping[VersionKey, Sequence[EngineClient]]) -> None:
        """Take note of which clients have which version now.

        A version may move to another engine while this one is replaced. Entries that this engine does not
        have move with their version. An entry that an engine has refused because it lacks the version is sent
        to an engine of the version, or gets the refusal if there is none.

        If the version is in other engines, too, entries that wait for this one move there at once. Suspects
        stay: a request that ends engines must not end two that do the same.
        """
        results: list[Result] = []
        for entry_id, pending in list(self._pending.items()):
            if pending.sent or not pending.wanted:
                continue
            target = self._target(pending, clients.get(pending.entry.key, ()))
            if target is self:
                if pending.refusal is not None and self._sender.channel is not None:
                    self._sender.offer(pending)  # it may be refused again
                    self._sender.plan_flush()
                continue
            if target is not None:
                if target._blocks.arena is None:
                    continue  # it has no engine yet
                try:
                    self._blocks.restore_inputs(pending)
                    target.offer(pending.entry, pending.accepted, pending.crashes)
                except InferpoolError as error:
                    results.append(self._local_result(pending, error))
            elif pending.refusal is not None:
                results.append(self._local_result(pending, pending.refusal))
            else:
                continue
            self._blocks.free(entry_id, pending)
        if results:
            self._results.put(results)

    def _target(self, pending: PendingEntry, clients: Sequence[EngineClient]) -> EngineClient | None:
        """The client that is to have an entry; None if no engine has its version."""
        here = self in clients
        if here and (pending.crashes or len(clients) == 1):
            return self
        others = [client for client in clients if client is not self and client.is_attached]
        if others:
            return least_busy(others)
        if here or not clients:
            return self if here else None
        return clients[0]

    def close(self) -> None:
        """Close the channel. Entries without a result get none."""
        self._disconnect()
        self._closed = True

    # The inbox.

    def offer(self, entry: Entry, accepted: bool = False, crashes: int = 0) -> None:
        """Send `entry`, whose inputs are put into a block and then dropped; raises Overloaded or NotReady.

        `accepted` says that another engine had accepted the entry, and `crashes` how many ended with it.
        """
        sender = self._sender
        if self._blocks.arena is None:
            raise NotReady("the engine is starting; try again later")
        if len(self._pending) >= self._most_entries:
            raise Overloaded(f"{self._most_entries} requests wait for the engine, the limit; try again later")
        if sender.is_behind:
            raise Overloaded("the engine does not keep up; try again later")
        if not 0 < entry.id < MOST_ID:
            raise ValueError(f"an entry has the id {entry.id}")
        if entry.parts:
            pending = self._blocks.put_parts(entry, sender.layouts)
        else:
            group: Hashable = None if entry.group == entry.id else entry.group
            layout = sender.layouts.find(entry.key, entry.inputs, entry.rows, group, entry.outputs)
            pending = self._blocks.put_inputs(entry, layout)
        if accepted:
            pending.accepted = True
            pending.crashes = crashes
        if sender.channel is not None:
            sender.offer(pending)
            if not sender.flush_planned:
                sender.plan_flush()

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise Overloaded, NotReady or QueueFull if no entry could be accepted now.

        A queue that has refused an entry counts as full until an entry of its version ends, or until the
        excess should have run. This is a guess in any case: the entry is offered later.
        """
        if self._blocks.arena is None:
            raise NotReady("the engine is starting; try again later")
        if len(self._pending) >= self._most_entries or self._sender.is_behind:
            raise Overloaded("the engine does not keep up; try again later")
        self._full.check(key, tenant, self._clock())

    def lend(self, nbytes: int, tensors_at: int) -> memoryview | None:
        """Return memory for a body of `nbytes` bytes, in which `offer` finds the tensors without a copy.

        Byte `tensors_at` of the body is aligned. None if the body is to be received elsewhere.
        """
        return self._blocks.lend(nbytes, tensors_at)

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry. With the reason `deadline` it gets DeadlineExceeded, after the call returns."""
        pending = self._pending.get(entry_id)
        if pending is None or not pending.wanted:
            return
        pending.wanted = False
        if reason == "deadline":
            error = DeadlineExceeded(
                "the deadline passed while the model ran" if self._blocks.has_run(pending) else
                "the deadline passed before the model could run"
            )  # fmt: skip
            self._results.put([self._local_result(pending, error)])
        if pending.sent:
            self._sender.cancel(entry_id, reason)
            self._sender.plan_flush()
        else:
            self._blocks.free(entry_id, pending)

    def refuse_all(self, error: Callable[[], InferpoolError]) -> None:
        """Answer every entry with an error now, and let the engine stop its runs."""
        for entry_id, pending in list(self._pending.items()):
            if pending.wanted:
                self._results.put([self._local_result(pending, error())])
                self.cancel(pending.entry.key, entry_id, "disconnected")

    def release(self, key: VersionKey, entry_id: int) -> None:
        """Take note that nobody reads the outputs of the entry any more. Does nothing if none are held."""
        self._blocks.release(entry_id)

    # Questions.

    def ask(self, message: object, then: Callable[[Any], None]) -> None:
        """Ask the engine something: `message` is a JSON value. `then` gets the reply, or None.

        The reply is None if no engine is attached, or the engine ends before it replies. Raises Overloaded if
        too many questions are without a reply.
        """
        sender = self._sender
        if sender.channel is None:
            self._loop.call_soon(then, None)
            return
        if self._questions.are_many or sender.is_behind:
            raise Overloaded("the engine does not answer; try again later")
        sender.outgoing += self._questions.record(message, then)
        sender.plan_flush()

    def flush(self) -> None:
        """Write what was offered since the last call. The loop calls this soon after an offer in any case."""
        self._sender.flush()

    # The channel.

    def _readable(self) -> None:
        channel = self._sender.channel
        if channel is None:
            return
        results: list[Result] = []
        broken = self._receiver.receive(channel, results)
        if results:
            self._results.deliver(results)
        if broken is not None:
            self._break(broken)
        elif self._sender.outgoing and not self._sender.flush_planned:
            self._sender.flush()

    def _local_result(self, pending: PendingEntry, error: InferpoolError) -> Result:
        return Result(pending.entry.id, None, error, max(0.0, self._clock() - pending.entry.arrived))

    def _break(self, reason: str) -> None:
        """Use the channel no more. The blocks stay as they are until the engine is known to be dead."""
        epoch = self._sender.epoch
        self._disconnect()
        self._lost(epoch, reason)

    def _disconnect(self) -> None:
        channel = self._sender.channel
        if channel is None:
            return
        self._loop.remove_reader(channel.fileno())
        self._sender.disconnect()
        channel.close()
        for then in self._questions.take_all():
            self._loop.call_soon(then, None)


def least_busy(clients: Sequence[EngineClient]) -> EngineClient:
    """The client with the fewest rows that have not ended, the first one of several."""
    best = clients[0]
    for client in clients:
        if client.rows < best.rows:
            best = client
    return best
