"""The instances of a pool: which of them wait, which are waking up, and which are lost."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from inferpool.backends.base import DeviceModel, LoadedModel
from inferpool.pool.buckets import BucketedModel
from inferpool.pool.instance import BatchSource, Instance
from inferpool.pool.log_limits import LogLimiter
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import InstanceState

log = logging.getLogger(__name__)

MAX_RESTARTS: Final = 5
"""Instances of a version that are replaced within `RESTART_WINDOW_S`; the next one that dies stays lost."""
RESTART_WINDOW_S: Final = 60.0
MAX_HUNG: Final = 2
"""Instances of a version that hang and are replaced; each of them keeps a core busy."""
DEVICE_MODELS: Final = (BucketedModel, DeviceModel)
"""The models that one thread at a time may run."""


class InstanceSet:
    """The instances of one version. The caller holds the pool's lock."""

    def __init__(
        self, key: VersionKey, source: BatchSource, clock: Callable[[], float], log_limiter: LogLimiter
    ) -> None:
        """Instances get their batches from `source`; the rest is passed on to them."""
        self._key = key
        self._source = source
        self._clock = clock
        self._log_limiter = log_limiter
        self._instances: list[Instance] = []
        self._idle: list[Instance] = []
        self._lost: list[str] = []
        self._hung: list[Instance] = []
        self._deaths: deque[float] = deque()
        self._started = 0
        self._waking = 0

    def __len__(self) -> int:
        """How many instances live and do not hang."""
        return len(self._instances)

    def start(self, model: LoadedModel, device: str) -> None:
        """Start an instance that runs `model` on `device`; raises RuntimeError if no thread is left."""
        self._started += 1
        name = f"{self._key.model}/{self._key.version}#{self._started}"
        instance = Instance(self._source, model, device, name, self._clock, self._log_limiter)
        instance.start()
        self._instances.append(instance)

    def remove(self, instance: Instance) -> None:
        """Take out an instance whose thread ends."""
        if instance.is_surplus:
            return
        self._instances.remove(instance)
        if instance.woken:
            self._waking -= 1  # the instance died on its way to the queue

    def replace(self, instance: Instance) -> None:
        """Start another instance in place of one that has died, or count it as lost."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            log.error("an instance of %s/%s died too often and is not replaced", *self._key)
            self._lost.append(instance.device)
            return
        try:
            self.start(instance.model, instance.device)
        except RuntimeError as fault:  # the system has no more threads
            log.error("an instance of %s/%s died and cannot be replaced: %s", *self._key, fault)
            self._lost.append(instance.device)

    def lose(self, instance: Instance) -> None:
        """Count an instance as lost that has died, because its device is."""
        log.error("%s/%s has an instance less: the device %s is lost", *self._key, instance.device)
        self._lost.append(instance.device)

    def hang(self, instance: Instance, *, replace: bool) -> None:
        """Count on an instance no more, because its run does not stop.

        With `replace`, start another instance of the same model in its place if several threads may run the
        model. The model then holds the memory that a second run takes, and the run that hangs its cores.
        """
        self._instances.remove(instance)
        self._hung.append(instance)
        if not replace or len(self._hung) > MAX_HUNG or isinstance(instance.model, DEVICE_MODELS):
            return
        try:
            self.start(instance.model, instance.device)
        except RuntimeError as fault:  # the system has no more threads
            log.error("an instance of %s/%s hangs and cannot be replaced: %s", *self._key, fault)
        else:
            instance.is_surplus = True

    def is_hung(self, instance: Instance) -> bool:
        """Whether an instance hangs."""
        return instance in self._hung

    def recover(self, instance: Instance) -> None:
        """Take note that the run of an instance that hung has ended; its replacement, if any, stays."""
        self._hung.remove(instance)
        if not instance.is_surplus:
            self._instances.append(instance)

    def all(self) -> list[Instance]:
        """Return the instances that live and do not hang."""
        return list(self._instances)

    def hung(self) -> list[Instance]:
        """Return the instances that hang."""
        return list(self._hung)

    def models(self) -> list[LoadedModel]:
        """Return the models of the instances, each once; those of instances that hang are left out."""
        return list({id(each.model): each.model for each in self._instances}.values())

    def running(self) -> list[Instance]:
        """Return the instances that run a batch, those that hang included."""
        return [each for each in (*self._instances, *self._hung) if each.batch is not None]

    def states(self) -> list[InstanceState]:
        """Return each instance's device and state, those that hang or are lost included."""
        now = self._clock()
        ready = [InstanceState(instance.device, "ready") for instance in self._instances]
        hung = [InstanceState(each.device, "hung", now - each.began) for each in self._hung]
        return ready + hung + [InstanceState(device, "lost") for device in self._lost]

    def free_at(self, now: float) -> list[float]:
        """Return when each instance is expected to be free; a moment in the past means that it is idle.

        A run that has taken longer than expected is expected to take as much longer again.
        """
        return [
            instance.busy_until
            if instance.busy_until > now or instance.batch is None
            else 2 * now - instance.busy_until
            for instance in self._instances
        ]

    @property
    def idle_count(self) -> int:
        """How many instances wait for work and have not been woken."""
        return len(self._idle)

    def begin_waiting(self, instance: Instance) -> None:
        """Note that an instance is about to wait for work."""
        self._idle.append(instance)

    def stop_waiting(self, instance: Instance) -> bool:
        """Note that an instance stops waiting; False if it has been woken meanwhile: a wake-up is coming."""
        if instance not in self._idle:
            return False
        self._idle.remove(instance)
        return True

    def arrived(self, instance: Instance) -> None:
        """Note that an instance looks for work, whether it was woken or not."""
        if instance.woken:
            instance.woken = False
            self._waking -= 1

    def wake_one(self) -> None:
        """Wake an instance, of which at least one must wait."""
        instance = self._idle.pop()
        instance.woken = True
        self._waking += 1
        instance.wake()

    def wake_for(self, load: float, batch_rows: int) -> None:
        """Wake an instance, unless those that are waking up take all of `load`, each up to `batch_rows`.

        If more instances are needed, each one that wakes up wakes the next.
        """
        if self._idle and load > self._waking * batch_rows:
            self.wake_one()

    def wake_some(self, count: int) -> None:
        """Wake `count` of the instances that wait, or all if they are fewer."""
        for _ in range(min(count, len(self._idle))):
            self.wake_one()

    def wake_all(self) -> None:
        """Wake every instance that waits."""
        while self._idle:
            self.wake_one()
