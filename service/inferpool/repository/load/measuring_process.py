"""Has a version proved and measured in a process of its own, so that the versions that serve notice little.

In the process that serves, this work takes the interpreter's lock and slots of the allocator from requests.
A thread of low priority that holds the lock even delays them until it gets a core. The process of its own
shares nothing with requests but the machine, gets only cores that nothing else wants while there are any,
and gives its memory back when it ends. A file that crashes its runtime ends this process alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferpool.engine.catalog_parcel import pack, unpack
from inferpool.engine.child_loop import reap
from inferpool.engine.control import Message
from inferpool.engine.spawn import Child, spawn
from inferpool.errors import LoadCancelled, LoadError
from inferpool.repository.lifecycle import PHASES, WARM, Phase
from inferpool.repository.load_room import COPIES_DURING_LOAD
from inferpool.system.priority import run_at_low_priority, run_only_on_idle_cores

log = logging.getLogger(__name__)

MODULE: Final = "inferpool.repository.load.measure_main"
OOM_SCORE: Final = 1000
"""If memory runs out, the kernel ends this process first."""
WORTH_BUDGET_S: Final = 0.5
"""From this budget for measuring on, a process is worth its start, which takes about so long."""
WORTH_BYTES: Final = 64 * 2**20
"""Models of at least this size are worth it whatever the budget is: proofs and sessions take long."""
PROCESS_BYTES: Final = 256 * 2**20
"""Memory of the process beside the model: the interpreter and a runtime."""
LOOK_S: Final = 0.1
"""Pause between two looks whether anybody still waits for the load."""
SHARE_LOOKS: Final = 10
"""Every so many of them, the times of the process are read as well, which takes longer."""
END_S: Final = 5.0
"""How long a process that has closed its socket may take to end."""
PATIENCE_S: Final = 5.0
"""The process begins again at a higher priority if its threads wait so long for cores, and hardly run."""
LEAST_SHARE: Final = 0.05
"""The share of a core that its threads get at least while they wait for `PATIENCE_S`."""


class MeasureRequest(NamedTuple):
    """What is measured, as plain values.

    Attributes:
        settings: the settings of the process that serves.
        config: the keys of `model.toml` that are given.
        device: the device of the engine that asks; None if it has all devices.
        remeasure: whether to ignore the plan that is kept.
    """

    model: str
    version: int
    file: str
    folder: str | None
    config: dict[str, Any]
    settings: dict[str, Any]
    device: str | None
    remeasure: bool


def is_worth_a_process(size_bytes: int, budget_s: float) -> bool:
    """Whether to measure a model of this size apart, if measuring may take `budget_s`."""
    return size_bytes >= WORTH_BYTES or budget_s >= WORTH_BUDGET_S


def has_room(size_bytes: int, limit_bytes: int, held_bytes: int) -> bool:
    """Whether a second process may load a model of this size, with `held_bytes` of `limit_bytes` taken."""
    return PROCESS_BYTES + COPIES_DURING_LOAD * size_bytes <= limit_bytes - held_bytes


class CoreShare:
    """Judges whether a process gets enough of the cores to get anywhere. It has no clock of its own."""

    def __init__(self) -> None:
        self._ran_s = self._waited_s = 0.0

    def is_starved(self, ran_s: float, waited_s: float) -> bool:
        """Whether the process hardly runs; the arguments are what all its threads have run and waited."""
        ran, waited = ran_s - self._ran_s, waited_s - self._waited_s
        if ran >= LEAST_SHARE * PATIENCE_S or ran < 0 or waited < 0:
            # A thread that ends takes its times with it.
            self._ran_s, self._waited_s = ran_s, waited_s
            return False
        return waited >= PATIENCE_S


class LoadPhases:
    """Tells somebody the phases of a load, each one once and in their order, whichever process is in them."""

    def __init__(self, enter: Callable[[Phase], None]) -> None:
        self._enter = enter
        self._reached = -1

    def enter(self, phase: Phase) -> None:
        """Tell the phase, unless the load was in it or in a later one already; may raise LoadCancelled."""
        number = PHASES.index(phase)
        if number > self._reached:
            self._reached = number
            self._enter(phase)


def measure_apart(
    request: MeasureRequest,
    plans: Mapping[str, str],
    enter: Callable[[Phase], None],
    is_over: Callable[[], bool],
    clock: Callable[[], float],
) -> Mapping[str, str] | None:
    """Have the plan of a version made by a new process; returns all plans that it knows then.

    None if there can be no process: the caller measures by itself. `plans` are those that the caller knows.
    `enter` is told the phases up to the measuring, and the process goes on once it returns. `is_over` says
    whether nobody waits for the load any more.

    Raises LoadCancelled, and LoadError if the version cannot be loaded, ends the process or takes too long.
    """
    waiting = _Waiting(enter, is_over, clock, clock() + float(request.settings["load_timeout_s"]))
    try:
        made = _try(request, plans, waiting, run_only_on_idle_cores, CoreShare())
        if made is None:
            # Only a privileged process could raise the priority of the first one.
            log.info("%s/%d: no core is idle; the measuring begins again", request.model, request.version)
            made = _try(request, plans, waiting, run_at_low_priority, None)
    except OSError as error:
        log.warning("%s/%d is measured beside requests: %s", request.model, request.version, error)
        return None
    return made


class _Waiting:
    """What a process that measures is waited for with; the arguments are those of `measure_apart`.

    Attributes:
        ends: when the process has taken too long, by the clock.
    """

    def __init__(
        self,
        enter: Callable[[Phase], None],
        is_over: Callable[[], bool],
        clock: Callable[[], float],
        ends: float,
    ) -> None:
        self.clock = clock
        self.ends = ends
        self.is_over = is_over
        self._enter = enter

    def enter(self, phase: Phase) -> None:
        """Tell a phase, unless the caller enters it. Waiting for other loads takes none of the time."""
        began = self.clock()
        if PHASES.index(phase) < PHASES.index(WARM):
            self._enter(phase)
        self.ends += self.clock() - began


def _try(
    request: MeasureRequest,
    plans: Mapping[str, str],
    waiting: _Waiting,
    lower: Callable[[int], None],
    share: CoreShare | None,
) -> Mapping[str, str] | None:
    """Have a process measure, whose priority `lower` sets; None if it is starved, as `share` judges.

    Raises OSError if there can be no process, and what `measure_apart` does.
    """
    child = spawn(MODULE, OOM_SCORE)
    try:
        lower(child.pid)
        log.info("%s/%d is measured by process %d", request.model, request.version, child.pid)
        parcel = pack({"request": request._asdict(), "plans": dict(plans)}, {})
        try:
            child.control.send("measure", {}, [parcel])
        finally:
            os.close(parcel)
        limit_s = float(request.settings["load_timeout_s"])
        return _follow(child, waiting, share, limit_s)
    finally:
        child.kill()
        reap(child)


def _follow(
    child: Child, waiting: _Waiting, share: CoreShare | None, limit_s: float
) -> Mapping[str, str] | None:
    looks = 0
    ready = select.poll()
    ready.register(child.control, select.POLLIN)
    while True:
        try:
            message = child.control.receive()
        except EOFError:
            raise LoadError(
                f"loading ended its process, which {_how_it_ended(child)}; nothing else was harmed"
            ) from None
        if message is not None and message.kind == "phase":
            waiting.enter(message.values["phase"])
            child.control.send("go_on")
        elif message is not None:
            return _result(message)
        elif waiting.is_over():
            raise LoadCancelled("the load was cancelled")
        elif waiting.clock() >= waiting.ends:
            raise LoadError(f"loading takes longer than {limit_s:g} s; --load-timeout-s allows more")
        else:
            looks += 1
            if looks % SHARE_LOOKS == 0 and share is not None and share.is_starved(*core_times(child.pid)):
                return None
            ready.poll(1000 * LOOK_S)


def _result(message: Message) -> Mapping[str, str]:
    """The plans in the last message of the process; raises LoadError if it has failed."""
    try:
        if message.kind == "measured":
            plans = unpack(message.descriptors[0]).catalog["plans"]
            return {str(name): str(text) for name, text in plans.items()}
        raise LoadError(str(message.values["reason"]))
    except (ValueError, LookupError, AttributeError) as error:
        raise LoadError(f"the process that measures has sent no plan: {error!r}") from error
    finally:
        message.close()


def _how_it_ended(child: Child) -> str:
    """How a process has ended that has closed its socket, as a phrase; it is not reaped yet."""
    try:
        status = child.process.wait(END_S)
    except subprocess.TimeoutExpired:
        return "answers no more"
    if status == -signal.SIGKILL:
        return "was ended by SIGKILL, as the kernel does if memory runs out"
    if -status in set(signal.Signals):
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def core_times(pid: int) -> tuple[float, float]:
    """Seconds that the threads of a process have run and have waited for a core; zeros if unknown.

    Source: the kernel's sched-stats.rst.
    """
    ran = waited = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):
            words = file.read_text().split()
            ran, waited = ran + int(words[0]), waited + int(words[1])
    return ran / 1e9, waited / 1e9
