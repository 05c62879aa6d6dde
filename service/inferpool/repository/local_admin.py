"""The admin side of a server whose models are in the process that answers requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from inferpool.errors import Reason
from inferpool.repository.admin import job_not_found
from inferpool.repository.jobs import Job
from inferpool.repository.repository import Repository
from inferpool.repository.traffic import CanaryState, Traffic


class LocalAdmin:
    """The admin side of a server whose models are in this process."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def jobs(self) -> Sequence[Job]:
        """All jobs, as `Admin` says."""
        return self._repository.jobs()

    async def begin_load(self, model: str, version: int | None, source: str | None = None) -> Job:
        """Load, as `Admin` says. In a thread, because it looks at files."""
        return await asyncio.to_thread(self._repository.admin_jobs.begin_load, model, version, source)

    async def begin_unload(self, model: str, version: int | None) -> Job:
        """Unload, as `Admin` says."""
        return await asyncio.to_thread(self._repository.admin_jobs.begin_unload, model, version)

    async def cancel_job(self, job_id: str) -> Job:
        """Cancel, as `Admin` says."""
        job = await asyncio.to_thread(self._repository.admin_jobs.cancel, job_id)
        if job is None:
            raise job_not_found(job_id)
        return job

    async def move_label(self, model: str, label: str, version: int | None) -> bool:
        """Move a label, as `Admin` says."""
        return await asyncio.to_thread(self._repository.routing.move_label, model, label, version)

    async def rollback(self, model: str) -> int:
        """Roll back, as `Admin` says."""
        return await asyncio.to_thread(self._repository.routing.rollback, model)

    async def set_traffic(self, model: str, traffic: Traffic | None) -> None:
        """Share requests out, as `Admin` says."""
        await asyncio.to_thread(self._repository.routing.set_traffic, model, traffic)

    async def end_canary(self, model: str, number: int, state: CanaryState, reason: Reason) -> bool:
        """End a canary, as `Admin` says."""
        return await asyncio.to_thread(self._repository.routing.end_canary, model, number, state, reason)
