"""The admin side of a server: what may be asked of its models, whichever process has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inferpool.errors import NotFound, Reason
from inferpool.repository.jobs import Job
from inferpool.repository.traffic import CanaryState, Traffic


class Admin(Protocol):
    """Changes models while they serve. All methods are called on the event loop."""

    def jobs(self) -> Sequence[Job]:
        """All jobs that run, and the last ones that have ended, oldest first."""

    async def begin_load(self, model: str, version: int | None, source: str | None = None) -> Job:
        """Load a version, or all that `model.toml` serves, beside those that serve.

        With a `source`, which is a store or an absolute path, the version is fetched from there first.

        Raises ModelNotFound or VersionNotFound if the folder has no such version; with a source InvalidInput,
        Forbidden for one that is not allowed, or Conflict if the folder cannot take the version.
        """

    async def begin_unload(self, model: str, version: int | None) -> Job:
        """Drain a version, or all of the model, and free its memory.

        Raises ModelNotFound or VersionNotFound.
        """

    async def cancel_job(self, job_id: str) -> Job:
        """End a job that runs. Raises NotFound, or Conflict if the job has ended or cannot be cancelled."""

    async def move_label(self, model: str, label: str, version: int | None) -> bool:
        """Let a label name a version that is ready; None removes it. Returns whether a restart keeps that.

        Raises ModelNotFound, InvalidInput for a word that cannot be a label, or Conflict.
        """

    async def rollback(self, model: str) -> int:
        """Let the version answer that answered before the present one; returns its number.

        While a canary runs, the stable version answers all requests again.
        Raises ModelNotFound, or Conflict if no other version is ready.
        """

    async def set_traffic(self, model: str, traffic: Traffic | None) -> None:
        """Share the requests for a model out; None lets the default version answer all of them.

        Raises ModelNotFound.
        """

    async def end_canary(self, model: str, number: int, state: CanaryState, reason: Reason) -> bool:
        """End the canary of the traffic of this number; returns whether it has ended by this call."""


def job_not_found(job_id: str) -> NotFound:
    """The error for a job that was never there, or is forgotten."""
    return NotFound(f'no job is called "{job_id[:100]}"; /jobs lists those that are remembered')
