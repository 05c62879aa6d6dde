"""The engine's end of the admin side: does what a web process has asked by way of the supervisor.

It is apart from the other end, `remote_admin`, which needs asyncio: engines import none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferpool.error_fields import error_fields
from inferpool.errors import InferpoolError
from inferpool.repository.admin import job_not_found
from inferpool.repository.repository import Repository
from inferpool.repository.traffic import traffic_from_json


def answer_admin(repository: Repository, values: Mapping[str, Any]) -> dict[str, Any]:
    """Do in an engine what a web process has asked; returns the `result`, or the `error`."""
    try:
        return {"result": _obey(repository, values)}
    except InferpoolError as error:
        return {"error": error_fields(error)}


def _obey(repository: Repository, values: Mapping[str, Any]) -> dict[str, Any]:
    action = values["action"]
    jobs, routing = repository.admin_jobs, repository.routing
    if action == "load":
        return jobs.begin_load(
            values["model"], values["version"], values["source"], values["job_id"]
        ).to_json()
    if action == "unload":
        return jobs.begin_unload(values["model"], values["version"], values["job_id"]).to_json()
    if action == "label":
        # The web process has looked whether the version is ready in any engine.
        kept = routing.move_label(values["model"], values["label"], values["version"], checked=True)
        repository.await_seen()
        return {"kept": kept}
    if action == "rollback":
        version = routing.rollback(values["model"])
        repository.await_seen()
        return {"version": version}
    if action == "traffic":
        routing.set_traffic(values["model"], traffic_from_json(values["traffic"]))
        repository.await_seen()
        return {}
    if action == "end_canary":
        ended = routing.end_canary(values["model"], values["number"], values["state"], values["reason"])
        repository.await_seen()
        return {"ended": ended}
    job = jobs.cancel(values["job"])
    if job is None:
        raise job_not_found(values["job"])
    return job.to_json()
