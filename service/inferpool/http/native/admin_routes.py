"""The admin routes: loads, unloads, labels, rollback and jobs. Each act leaves a line in the log."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from inferpool.http.access.audit import audited
from inferpool.http.body_model import BodyModel
from inferpool.http.native.api import NATIVE_API
from inferpool.http.openapi_parts import error_responses
from inferpool.http.route_table import RouteTable
from inferpool.repository.admin import Admin, job_not_found
from inferpool.repository.catalog import Catalog, find_model
from inferpool.repository.jobs import Job


class _Body(BodyModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class VersionBody(_Body):
    """Which version is meant."""

    version: int | None = Field(None, ge=1, description="All versions that `model.toml` serves without it.")


class LoadBody(_Body):
    """Which version is meant, and where it comes from."""

    version: int | None = Field(
        None,
        ge=1,
        lt=2**53,
        description="All versions that `model.toml` serves without it; with `from`, the number that the"
        " version gets, by default that of the source.",
    )
    source: str | None = Field(
        None,
        alias="from",
        min_length=1,
        max_length=4096,
        description="A store (`s3://…`, `gs://…`, `az://…`, `https://…`, `hf://…`, `oci://…`) or an absolute"
        " path of the server's machine, from which the version is fetched into the models folder. The setting"
        " `load_from` has the prefixes that are allowed.",
        examples=["s3://bucket/models/digits/3"],
    )


class LabelBody(_Body):
    """Which version a label is to name."""

    version: int = Field(ge=1)


class JobOut(BodyModel):
    """A load or an unload. `share` is what is done of it, `seconds_left` by what the last load took.

    `source` is where the version comes from, if that is not the models folder; `versions` is empty until it
    has come.
    """

    id: str
    kind: Literal["load", "unload"]
    model: str
    source: str | None
    versions: list[int]
    state: Literal["running", "done", "failed", "cancelled"]
    phase: str | None
    share: float
    seconds_left: float | None
    reason: str
    created: datetime
    ended: datetime | None


class JobsOut(BodyModel):
    """All jobs that run, and the last ones that have ended, oldest first."""

    jobs: list[JobOut]


class LabelOut(BodyModel):
    """What a label names; `kept` tells whether a restart of the server keeps that."""

    model: str
    label: str
    version: int | None
    kept: bool


class RollbackOut(BodyModel):
    """The version that answers again."""

    model: str
    version: int


def job_out(job: Job) -> JobOut:
    """The response body for a job."""
    share, left_s = job.progress(time.monotonic())
    return JobOut(
        id=job.id,
        kind=job.kind,
        model=job.model,
        source=job.source or None,
        versions=list(job.versions),
        state=job.state,
        phase=job.phase or None,
        share=round(share, 4),
        seconds_left=None if left_s is None else round(left_s, 3),
        reason=job.reason,
        created=datetime.fromtimestamp(job.created, UTC),
        ended=datetime.fromtimestamp(job.ended, UTC) if job.ended else None,
    )


def add_admin(app: RouteTable, catalog: Catalog, admin: Admin) -> None:
    """Give `app` the admin routes."""
    _add_loads(app, admin)
    _add_labels(app, catalog, admin)
    _add_jobs(app, admin)


def _add_loads(app: RouteTable, admin: Admin) -> None:
    accepted: dict[str, Any] = {
        "tags": ["admin"],
        "status_code": 202,
        "responses": _errors("400", "403", "404", "409", "415", "422"),
    }

    async def answer(request: Request, response: Response, act: str, job: Awaitable[Job]) -> JobOut:
        begun = await audited(request, act, job, lambda job: f"job {job.id}")
        response.headers["location"] = f"/jobs/{begun.id}"
        return job_out(begun)

    @app.post("/models/{model}/load", summary="Load a model, or one version", **accepted)
    async def load_model(
        request: Request, response: Response, model: str, body: LoadBody | None = None
    ) -> JobOut:
        """A version is loaded beside those that serve, and takes over when it is ready."""
        version, source = (None, None) if body is None else (body.version, body.source)
        act = _named("load", model, version)
        if source is not None:
            from inferpool.repository.stores.allowed_sources import parse_source

            act += f" from {parse_source(source)}"
        return await answer(request, response, act, admin.begin_load(model, version, source))

    @app.post("/models/{model}/unload", summary="Unload a model, or one version", **accepted)
    async def unload_model(
        request: Request, response: Response, model: str, body: VersionBody | None = None
    ) -> JobOut:
        """The accepted requests are answered first; then the memory is free."""
        version = None if body is None else body.version
        act = _named("unload", model, version)
        return await answer(request, response, act, admin.begin_unload(model, version))

    @app.post(
        "/models/{model}/rollback",
        tags=["admin"],
        summary="Let the version answer that answered before the present one",
        responses=_errors("403", "404", "409"),
    )
    async def roll_back_model(request: Request, model: str) -> RollbackOut:
        """The label `stable` names that version from then on. If a canary runs, that ends the canary."""
        version = await audited(
            request, f"rollback {model}", admin.rollback(model), lambda version: f"version {version} answers"
        )
        return RollbackOut(model=model, version=version)


def _add_labels(app: RouteTable, catalog: Catalog, admin: Admin) -> None:
    @app.put(
        "/models/{model}/labels/{label}",
        tags=["admin"],
        summary="Let a label name a version that is ready",
        responses=_errors("400", "403", "404", "409", "415", "422"),
    )
    async def set_label(request: Request, model: str, label: str, body: LabelBody) -> LabelOut:
        act = f"label {model}/{label} = {body.version}"

        async def move() -> bool:
            find_model(catalog, model).version(str(body.version))
            return await admin.move_label(model, label, body.version)

        kept = await audited(request, act, move(), _kept)
        return LabelOut(model=model, label=label, version=body.version, kept=kept)

    @app.delete(
        "/models/{model}/labels/{label}",
        tags=["admin"],
        summary="Remove a label",
        responses=_errors("403", "404", "422"),
    )
    async def remove_label(request: Request, model: str, label: str) -> LabelOut:
        async def remove() -> bool:
            found = find_model(catalog, model)
            if label not in found.labels:
                found.version(label)
            return await admin.move_label(model, label, None)

        kept = await audited(request, f"remove label {model}/{label}", remove(), _kept)
        return LabelOut(model=model, label=label, version=None, kept=kept)


def _add_jobs(app: RouteTable, admin: Admin) -> None:
    @app.get("/jobs", tags=["admin"], summary="The loads and unloads", responses=_errors("403"))
    async def read_jobs() -> JobsOut:
        return JobsOut(jobs=[job_out(job) for job in admin.jobs()])

    @app.get("/jobs/{job}", tags=["admin"], summary="A load or an unload", responses=_errors("403", "404"))
    async def read_job(job: str) -> JobOut:
        return job_out(find_job(admin, job))

    @app.delete("/jobs/{job}", tags=["admin"], summary="Cancel a job", responses=_errors("403", "404", "409"))
    async def cancel_job(request: Request, job: str) -> JobOut:
        """Versions that serve go on serving."""
        ended = await audited(request, f"cancel job {job}", admin.cancel_job(job), lambda job: job.state)
        return job_out(ended)


def find_job(admin: Admin, job_id: str) -> Job:
    """The job with this id; raises NotFound."""
    found = next((job for job in admin.jobs() if job.id == job_id), None)
    if found is None:
        raise job_not_found(job_id)
    return found


def _named(act: str, model: str, version: int | None) -> str:
    return f"{act} {model}" if version is None else f"{act} {model}/{version}"


def _kept(kept: bool) -> str:
    return "done" if kept else "done, until the next start"


def _errors(*statuses: str) -> dict[int | str, dict[str, Any]]:
    documented = error_responses("Problem", NATIVE_API.problem_type.decode())
    return {int(status): documented[status] for status in statuses}
