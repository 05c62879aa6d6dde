"""The admin side of a web process: the supervisor passes what is asked to the engine that has the model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from inferpool.error_fields import error_from_fields
from inferpool.errors import Conflict, NotReady, Reason
from inferpool.repository.admin import job_not_found
from inferpool.repository.jobs import Job
from inferpool.repository.remote_catalog import RemoteCatalog
from inferpool.repository.traffic import CanaryState, Traffic

ANSWER_S: Final = 60.0
"""How long an engine may take to answer; looking at a folder takes much less."""


class RemoteAdmin:
    """Asks through the control socket. All methods are called on the event loop."""

    def __init__(self, catalog: RemoteCatalog, send: Callable[[str, Mapping[str, Any]], None]) -> None:
        """`send` sends a control message to the supervisor, by its kind and values."""
        self._catalog = catalog
        self._send = send
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}

    def jobs(self) -> Sequence[Job]:
        """All jobs, as `Admin` says."""
        return self._catalog.jobs()

    async def begin_load(self, model: str, version: int | None, source: str | None = None) -> Job:
        """Load, as `Admin` says."""
        return Job.from_json(await self._ask("load", model=model, version=version, source=source))

    async def begin_unload(self, model: str, version: int | None) -> Job:
        """Unload, as `Admin` says."""
        return Job.from_json(await self._ask("unload", model=model, version=version))

    async def cancel_job(self, job_id: str) -> Job:
        """Cancel, as `Admin` says."""
        if all(job.id != job_id for job in self.jobs()):
            raise job_not_found(job_id)
        return Job.from_json(await self._ask("cancel", job=job_id))

    async def move_label(self, model: str, label: str, version: int | None) -> bool:
        """Move a label, as `Admin` says. The version may be in another engine than the model's labels."""
        found = self._catalog.models().get(model)
        target = None if found is None else found.versions.get(version or 0)
        if target is not None and target.state != "ready":
            raise Conflict(
                f'"{label}" cannot name version {version} of "{model}", which is {target.state}; load it'
                " first"
            )
        return bool((await self._ask("label", model=model, label=label, version=version))["kept"])

    async def rollback(self, model: str) -> int:
        """Roll back, as `Admin` says."""
        return int((await self._ask("rollback", model=model))["version"])

    async def set_traffic(self, model: str, traffic: Traffic | None) -> None:
        """Share requests out, as `Admin` says."""
        await self._ask("traffic", model=model, traffic=None if traffic is None else traffic.to_json())

    async def end_canary(self, model: str, number: int, state: CanaryState, reason: Reason) -> bool:
        """End a canary, as `Admin` says."""
        found = await self._ask("end_canary", model=model, number=number, state=state, reason=reason)
        return bool(found["ended"])

    def take_answer(self, values: Mapping[str, Any]) -> None:
        """Take the answer to a question from the supervisor."""
        waiting = self._waiting.pop(values["id"], None)
        if waiting is not None and not waiting.done():
            waiting.set_result(values)

    async def _ask(self, action: str, **values: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send("admin", {"id": number, "action": action, **values})
        try:
            found = await asyncio.wait_for(answer, ANSWER_S)
        except TimeoutError:
            raise NotReady("the engine of the model does not answer; try again later") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in found:
            raise error_from_fields(found["error"])
        result: dict[str, Any] = found["result"]
        return result
