"""The routes of `/v2` beside `infer`: health, metadata, configuration, statistics, repository."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from inferpool.errors import InvalidInput, LoadFailed, NotReady, UnsupportedMediaType
from inferpool.http.access.audit import audited
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.predict.body_buffer import BodyBuffer, too_large
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.route_table import RouteTable
from inferpool.http.v2.descriptions import config_out, index_out, metadata_out, stats_out
from inferpool.http.v2.schemas import (
    Error,
    IndexEntry,
    IndexQuery,
    Live,
    ModelConfig,
    ModelMetadata,
    ModelNames,
    ModelReady,
    Ready,
    Server,
    Statistics,
)
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import Catalog, ModelView, VersionView, find_model, find_ready
from inferpool.repository.jobs import DONE, RUNNING, Job
from inferpool.tensors import name_text, value_text
from inferpool.wire.json_bodies import read_object, wrong_field

Responses = dict[int | str, dict[str, Any]]

_MAX_QUERY_BYTES: Final = 64 * 1024
_MISSING: Responses = {404: {"model": Error, "description": "`model_not_found` or `version_not_found`"}}
_UNABLE: Responses = {**_MISSING, 503: {"model": Error, "description": "`not_ready`"}}
_CHANGES: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        400: {"model": Error, "description": "`malformed_body`, or `load_failed` with the reason"},
        403: {"model": Error, "description": "`forbidden`"},
        404: {"model": Error, "description": "`model_not_found`"},
        413: {"model": Error, "description": "`body_too_large`"},
        422: {"model": Error, "description": "`invalid_input`"},
    },
}
_PARAMETERS: Final = {
    "requestBody": {
        "content": {
            JSON_TYPE: {"schema": {"type": "object", "properties": {"parameters": {"type": "object"}}}}
        }
    }
}
_LOOK_S: Final = 0.02
"""Pause between two looks at a job that a response waits for."""


def add_v2(app: RouteTable, catalog: Catalog, predictor: Predictor, admin: Admin) -> None:
    """Give `app` the routes of `/v2`, except infer."""
    _add_server(app, catalog)
    _add_models(app, catalog, predictor)
    _add_repository(app, catalog)
    _add_loads(app, admin)


def _add_server(app: RouteTable, catalog: Catalog) -> None:
    # The protocol's own description writes this path with a slash at the end.
    @app.get("/v2/", include_in_schema=False)
    @app.get("/v2", tags=["v2"], summary="The server and the protocol extensions that it has")
    async def read_v2_server() -> Server:
        return Server()

    @app.get("/v2/health/live", tags=["v2"], summary="Whether the process answers")
    async def read_v2_live() -> Live:
        return Live()

    @app.get(
        "/v2/health/ready",
        tags=["v2"],
        summary="Whether every required model can answer",
        response_model_exclude_none=True,
        responses={503: {"model": Ready}},
    )
    async def read_v2_ready(response: Response) -> Ready:
        await catalog.refresh()
        health = catalog.health()
        if health.ready:
            return Ready(ready=True)
        response.status_code = 503
        return Ready(ready=False, error=f"the server is {health.status}", code="not_ready")


def _add_models(app: RouteTable, catalog: Catalog, predictor: Predictor) -> None:
    def find(model: str, version: str | None) -> tuple[ModelView, VersionView]:
        view = find_ready(catalog, model, version)
        return find_model(catalog, model), view

    async def is_ready(model: str, version: str | None) -> ModelReady:
        await catalog.refresh()
        view = find_ready(catalog, model, version)
        if not any(instance.state == "ready" for instance in catalog.live(view.key).instances):
            raise NotReady(
                f'version {view.key.version} of "{model}" has lost its instances; restart the server'
            )
        return ModelReady(name=model)

    async def metadata(model: str, version: str | None) -> ModelMetadata:
        return metadata_out(*find(model, version))

    async def config(model: str, version: str | None) -> ModelConfig:
        await catalog.refresh()
        found, view = find(model, version)
        return config_out(found, view, catalog.live(view.key))

    async def stats(views: list[VersionView]) -> Statistics:
        await catalog.refresh()
        now, now_ms = predictor.clock(), 1000 * time.time()
        listed = []
        for view in views:
            counted = predictor.resolver.stats(view.key)
            last_ms = 0 if counted.last is None else round(now_ms - 1000 * (now - counted.last))
            listed.append(stats_out(view, predictor.resolver.batches(view.key), counted, last_ms))
        return Statistics(model_stats=listed)

    async def model_stats(model: str, version: str | None) -> Statistics:
        found = find_model(catalog, model)
        return await stats(_versions(found) if version is None else [found.version(version)])

    @app.get("/v2/models", tags=["v2"], summary="The names of the models in the repository")
    async def read_v2_models() -> ModelNames:
        return ModelNames(models=list(catalog.models()))

    @app.get("/v2/models/stats", tags=["v2"], summary="Statistics of every version")
    async def read_v2_stats() -> Statistics:
        return await stats([view for model in catalog.models().values() for view in _versions(model)])

    _add_pair(
        app, "read_v2_{}", "", metadata, ModelMetadata,
        "Inputs and outputs of a model", "Inputs and outputs of a version, by number or label",
    )  # fmt: skip
    _add_pair(
        app, "read_v2_{}_ready", "/ready", is_ready, ModelReady,
        "Whether the model can answer", "Whether the model can answer",
    )  # fmt: skip
    _add_pair(
        app, "read_v2_{}_config", "/config", config, ModelConfig,
        "The configuration in Triton's terms", "The configuration in Triton's terms",
        response_model_exclude_none=True,
    )  # fmt: skip
    _add_pair(
        app, "read_v2_{}_stats", "/stats", model_stats, Statistics,
        "Statistics of a model's versions", "Statistics of a version",
        responses=_MISSING,
    )  # fmt: skip


def _add_pair(
    app: RouteTable,
    name: str,
    suffix: str,
    answer: Callable[[str, str | None], Awaitable[BaseModel]],
    body: type[BaseModel],
    of_model: str,
    of_version: str,
    *,
    responses: Responses = _UNABLE,
    response_model_exclude_none: bool = False,
) -> None:
    """Give `app` two routes with the same `answer`: one names a model, the other a version of it.

    `name` and `suffix` are those of the functions and the paths, `of_model` and `of_version` the summaries.
    """

    async def read_model(model: str) -> BaseModel:
        return await answer(model, None)

    async def read_version(model: str, version: str) -> BaseModel:
        return await answer(model, version)

    for kind, path, summary, endpoint in (
        ("model", "/v2/models/{model}", of_model, read_model),
        ("version", "/v2/models/{model}/versions/{version}", of_version, read_version),
    ):
        app.add_api_route(
            path + suffix,
            endpoint,
            name=name.format(kind),
            tags=["v2"],
            summary=summary,
            response_model=body,
            responses=responses,
            response_model_exclude_none=response_model_exclude_none,
        )


def _add_repository(app: RouteTable, catalog: Catalog) -> None:
    @app.post(
        "/v2/repository/index",
        tags=["v2"],
        summary="Every version in the repository, and its state",
        responses={
            400: {"model": Error, "description": "`malformed_body`"},
            413: {"model": Error, "description": "`body_too_large`"},
            422: {"model": Error, "description": "`invalid_input`"},
        },
        openapi_extra={"requestBody": {"content": {JSON_TYPE: {"schema": IndexQuery.model_json_schema()}}}},
    )
    async def read_v2_index(request: Request) -> list[IndexEntry]:
        fields = await _read_body(request, '{"ready": true}')
        ready = fields.get("ready", False)
        if not isinstance(ready, bool):
            raise InvalidInput(f'"ready" is {value_text(ready)}; send true or false', field="ready")
        return index_out(catalog.models().values(), ready)


def _add_loads(app: RouteTable, admin: Admin) -> None:
    @app.post(
        "/v2/repository/models/{model}/load",
        tags=["v2"],
        summary="Load a model, and wait until it is ready",
        openapi_extra=_PARAMETERS,
        **_CHANGES,
    )
    async def load_v2_model(request: Request, model: str) -> None:
        """The versions that serve go on serving meanwhile. A later request for the same load joins it."""
        for name in await _read_parameters(request):
            raise InvalidInput(
                f"the parameter {name_text(name)} is not supported; change the models folder instead",
                field=name,
            )
        await _wait(request, admin, f"load {model}", admin.begin_load(model, None))

    @app.post(
        "/v2/repository/models/{model}/unload",
        tags=["v2"],
        summary="Unload a model, and wait until its last request is answered",
        openapi_extra=_PARAMETERS,
        **_CHANGES,
    )
    async def unload_v2_model(request: Request, model: str) -> None:
        """Its memory is free when the response arrives."""
        await _read_parameters(request)
        await _wait(request, admin, f"unload {model}", admin.begin_unload(model, None))


async def _wait(request: Request, admin: Admin, act: str, begun: Awaitable[Job]) -> None:
    """Wait for the end of a job. Raises LoadFailed if it fails."""

    async def ended() -> Job:
        job = await begun
        while job.state == RUNNING:
            await asyncio.sleep(_LOOK_S)
            job = next((found for found in admin.jobs() if found.id == job.id), job)
        if job.state != DONE:
            raise LoadFailed(f"job {job.id}: {act} has {job.state}: {job.reason}")
        return job

    await audited(request, act, ended(), lambda job: f"job {job.id} is done")


async def _read_parameters(request: Request) -> dict[str, Any]:
    parameters = (await _read_body(request, '{"parameters": {}}')).get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong_field("parameters", parameters, "an object")
    return parameters or {}


async def _read_body(request: Request, example: str) -> dict[str, Any]:
    """The fields of a small JSON body, which FastAPI cannot read.

    Clients of the protocol send none, or one without a Content-Type.
    """
    head = RequestHead(None, None, request.scope["headers"])
    if head.content_encoding not in ("", "identity"):
        raise UnsupportedMediaType(
            f'this route takes no Content-Encoding "{head.content_encoding[:40]}"; send the JSON as it is'
        )
    if (head.content_length or 0) > _MAX_QUERY_BYTES:
        raise too_large(_MAX_QUERY_BYTES)
    body = BodyBuffer(RequestHead(None, None, ()), _MAX_QUERY_BYTES, _MAX_QUERY_BYTES)
    async for chunk in request.stream():
        body.add(chunk)
    return read_object(body.finish() or b"{}", example)


def _versions(model: ModelView) -> list[VersionView]:
    return [view for _, view in sorted(model.versions.items())]
