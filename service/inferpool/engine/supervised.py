"""What the supervisor knows of the processes that it has started, and of those that have ended."""

from __future__ import annotations

from inferpool.engine.restart_policy import Version
from inferpool.engine.spawn import Child


class SupervisedWeb:
    """A web process, or the place of one that is being started again."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        self.started = 0.0
        self.pause_s = 0.0
        self.listens = False
        self.arenas: dict[str, int] = {}
        self.seen = 0
        """The number of the last catalog that the process serves by."""


class Crash:
    """The facts about the death of an engine, collected until all reports are in."""

    def __init__(self, how: str, lived_s: float, loading: set[Version], reports: set[int]) -> None:
        self.how = how
        self.lived_s = lived_s
        self.loading = loading
        self.reports = reports
        self.running: set[Version] = set()
        self.confirmed: set[Version] = set()


class SupervisedEngine:
    """An engine, or the place of one that is being started again.

    Attributes:
        device: the device whose instances it has.
        number: 1 for the first engine of the device; the others wait until that one has loaded.
        parent: the engine that has lost the only version of this one to it; None if this one has all versions
            of its device.
        epoch: which process this is in the engine's life; a late answer of an earlier one is ignored.
        only: the versions that the engine takes; None for all but `skip`.
        skip_later: the versions that the process after the next one does not take either.
        loading: the versions that load, with the moment of the beginning.
        told: whether the process knows what it is to load.
        connected: the web processes that have a socket to it.
        loaded: whether every version is ready or has failed.
        blameless: whether the supervisor ends it because of a load, so that no request is to blame.
        answers: whether it has all the versions that its predecessor had.
        rescan_due: whether an administrator has asked for a look at the models folder, which no process has
            taken note of yet.
        hung: the versions of which a run did not stop, for which the engine ends itself.
        crash: what is known about the death of its last process; None once it is decided what follows.
    """

    def __init__(self, name: str, device: str, number: int = 1) -> None:
        self.name = name
        self.device = device
        self.number = number
        self.parent: str | None = None
        self.only: list[Version] | None = None
        self.skip: set[Version] = set()
        self.skip_later: set[Version] = set()
        self.child: Child | None = None
        self.pid = 0
        self.epoch = 0
        self.started = 0.0
        self.told = False
        self.connected: set[int] = set()
        self.loading: dict[Version, float] = {}
        self.loaded = False
        self.answers = False
        self.blameless = False
        self.rescan_due = False
        self.hung: set[Version] = set()
        self.crash: Crash | None = None
