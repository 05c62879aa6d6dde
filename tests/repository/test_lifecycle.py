"""The lifecycle of one version, under every order of requests and events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from inferpool.repository.lifecycle import (
    BEGIN_DRAIN,
    BEGIN_LOAD,
    CANCEL_LOAD,
    DRAINING,
    FAILED,
    FETCH,
    LOAD,
    PHASES,
    READY,
    UNLOADED,
    Phase,
    VersionLifecycle,
)

SOURCES = st.integers(1, 3)


class Lifecycles(RuleBasedStateMachine):
    """Requests come at any time; the world obeys the steps and tells how loads and drains end."""

    def __init__(self) -> None:
        super().__init__()
        self.version = VersionLifecycle()
        self.now = 0.0
        self.bad: set[int] = set()
        self.last_phase = -1

    @rule(source=SOURCES, retry=st.booleans())
    def want(self, source: int, retry: bool) -> None:
        self.version.want(source, retry=retry)

    @rule(warm_s=st.floats(0, 10))
    def unwant(self, warm_s: float) -> None:
        self.version.unwant(self.now + warm_s)

    @rule(source=SOURCES)
    def files_are_wrong(self, source: int) -> None:
        before = self.version.actual
        self.version.fail(source, "no model file")
        if before == READY:
            assert self.version.actual == READY, "a bad file beside it ends no version that serves"

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(source=SOURCES)
    def break_or_mend(self, source: int) -> None:
        self.bad ^= {source}

    @rule()
    def obey(self) -> None:
        before = self.version.actual
        step = self.version.step(self.now)
        if step == BEGIN_LOAD:
            assert self.version.loading is None
            self.version.load_begun()
            self.last_phase = -1
            assert (self.version.actual == READY) == (before == READY), "the old one serves on"
        elif step == CANCEL_LOAD:
            self.version.cancel_begun()
            assert self.version.step(self.now) is None
        elif step == BEGIN_DRAIN:
            assert self.version.wanted is None
            assert self.now >= self.version.warm_until
            self.version.drain_begun()

    @precondition(lambda self: self.version.loading is not None)
    @rule(phase=st.sampled_from(PHASES))
    def enter(self, phase: Phase) -> None:
        self.version.entered(phase)
        assert self.version.phase is not None
        at = PHASES.index(self.version.phase)
        assert at >= self.last_phase
        self.last_phase = at

    @precondition(lambda self: self.version.loading is not None)
    @rule(cancelled=st.booleans())
    def end_load(self, cancelled: bool) -> None:
        version, source, before = self.version, self.version.loading, self.version.actual
        if version._cancelling and cancelled:
            version.cancelled()
        elif source in self.bad:
            version.load_failed("bad")
            assert version.actual == (before if before in (READY, DRAINING) else FAILED)
        elif before == DRAINING:
            version.cancelled()
        else:
            version.loaded()
            assert (version.actual, version.served) == (READY, source)

    @precondition(lambda self: self.version.actual == DRAINING)
    @rule()
    def end_drain(self) -> None:
        self.version.drained()

    @invariant()
    def is_consistent(self) -> None:
        version = self.version
        assert (version.phase is None) == (version.loading is None)
        assert (version.served is not None) == (version.actual in (READY, DRAINING))
        if version.succeeded:
            assert version.settled or version.loading is not None

    def teardown(self) -> None:
        """Whatever has happened, obeying all steps leads to what is wanted, or to a failure with a reason."""
        version = self.version
        for _ in range(10):
            self.now += 20
            self.obey()
            if version.loading is not None:
                self.end_load(cancelled=True)
            if version.actual == DRAINING:
                version.drained()
        assert version.settled
        assert version.step(self.now) is None
        if version.wanted is None:
            assert version.actual in (UNLOADED, FAILED)
        elif not version.succeeded:
            assert version.reason


Lifecycles.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestLifecycles = Lifecycles.TestCase


def test_a_failed_source_is_tried_again_only_when_it_changes_or_is_asked_for() -> None:
    version = VersionLifecycle()
    version.want("a")
    version.load_begun()
    version.load_failed("bad")
    version.want("a")
    assert version.step(0) is None
    version.want("b")
    assert version.step(0) == BEGIN_LOAD
    version.want("a", retry=True)
    assert version.step(0) == BEGIN_LOAD


def test_a_version_that_is_kept_warm_serves_again_without_a_load() -> None:
    version = VersionLifecycle()
    version.want("a")
    version.load_begun()
    version.loaded()
    version.unwant(warm_until=60)
    assert version.step(59) is None
    version.want("a")
    assert version.step(61) is None
    assert version.succeeded


def test_a_new_source_loads_beside_the_old_one() -> None:
    version = VersionLifecycle()
    version.want("a")
    version.load_begun()
    version.loaded()
    version.want("b")
    assert version.step(0) == BEGIN_LOAD
    version.load_begun()
    version.entered(LOAD)
    version.entered(FETCH)
    assert (version.actual, version.served, version.phase) == (READY, "a", LOAD)
    version.loaded()
    assert version.served == "b"
