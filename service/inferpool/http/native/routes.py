"""The native routes beside predict: models, health and metrics, and the admin routes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from inferpool.http.accept_headers import accepts_gzip
from inferpool.http.native.admin_routes import add_admin
from inferpool.http.native.api import NATIVE_API
from inferpool.http.native.sample_routes import add_samples
from inferpool.http.native.schemas import (
    HealthOut,
    LiveOut,
    ModelDetail,
    Models,
    ReadyOut,
    SamplesOut,
    VersionDetail,
    health_out,
    model_out,
    samples_out,
    version_out,
)
from inferpool.http.native.scrapes import Scrapes
from inferpool.http.native.status_route import add_status
from inferpool.http.native.traffic_routes import add_traffic
from inferpool.http.openapi_parts import error_responses
from inferpool.http.predict.observations import Observations
from inferpool.http.route_table import RouteTable
from inferpool.observe.metrics import Metrics
from inferpool.observe.metrics_page import MetricsPage
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import Catalog, find_model


def add_native(
    app: RouteTable, catalog: Catalog, metrics: Metrics, admin: Admin, observations: Observations
) -> None:
    """Give `app` the native routes."""
    # The admin routes come first: `/models/{model}/{version}` matches their paths too, and a request
    # with a wrong method must be told of the admin route's.
    add_admin(app, catalog, admin)
    add_traffic(app, catalog, metrics, admin)
    add_samples(app, observations)
    _add_models(app, catalog, metrics)
    add_status(app, catalog, metrics)
    _add_health(app, catalog)
    _add_metrics(app, catalog, metrics)


def _add_models(app: RouteTable, catalog: Catalog, metrics: Metrics) -> None:
    not_found: dict[int | str, dict[str, Any]] = {404: _documented_error("404")}

    @app.get("/models", tags=["models"], summary="Every model in the repository")
    async def read_models() -> Models:
        await catalog.refresh()
        return Models.model_validate(
            {
                "models": [
                    model_out(model, catalog, metrics).model_dump() for model in catalog.models().values()
                ]
            }
        )

    @app.get(
        "/models/{model}", tags=["models"], summary="A model and its measured latency", responses=not_found
    )
    async def read_model(model: str) -> ModelDetail:
        await catalog.refresh()
        return model_out(find_model(catalog, model), catalog, metrics)

    @app.get(
        "/models/{model}/{version}",
        tags=["models"],
        summary="A version, by number or label",
        responses=not_found,
    )
    async def read_version(model: str, version: str) -> VersionDetail:
        await catalog.refresh()
        return version_out(find_model(catalog, model).version(version), catalog, metrics)

    @app.get(
        "/models/{model}/{version}/samples",
        tags=["models"],
        summary="Golden samples of a version, to try it with",
        responses=not_found,
    )
    async def read_samples(model: str, version: str) -> SamplesOut:
        """The inputs of the files in `samples/`, as many as have 16 KiB together."""
        return samples_out(find_model(catalog, model).version(version))


def _add_health(app: RouteTable, catalog: Catalog) -> None:
    @app.get(
        "/health",
        tags=["health"],
        summary="Whether the server can answer, and the problems of its models",
        responses={503: {"model": HealthOut}},
    )
    async def read_health(response: Response) -> HealthOut:
        await catalog.refresh()
        health = catalog.health()
        response.status_code = 200 if health.ready else 503
        return health_out(health)

    @app.get("/health/live", tags=["health"], summary="Whether the process answers")
    async def read_live() -> LiveOut:
        return LiveOut()

    @app.get(
        "/health/ready",
        tags=["health"],
        summary="Whether every required model can answer",
        responses={503: {"model": ReadyOut}},
    )
    async def read_ready(response: Response) -> ReadyOut:
        await catalog.refresh()
        ready = catalog.health().ready
        response.status_code = 200 if ready else 503
        return ReadyOut(ready=ready)


def _add_metrics(app: RouteTable, catalog: Catalog, metrics: Metrics) -> None:
    scrapes = Scrapes(MetricsPage(metrics))

    @app.get("/metrics", tags=["health"], summary="All metrics, for Prometheus", response_class=Response)
    async def read_metrics(request: Request) -> Response:
        """Prometheus text, or OpenMetrics if Accept asks for it; gzip if Accept-Encoding allows that."""
        await catalog.refresh()
        wanted, packs = request.headers.get("accept", ""), request.headers.get("accept-encoding", "")
        body, headers = await scrapes.make(wanted, accepts_gzip(packs))
        return Response(body, headers=headers)


def _documented_error(status: str) -> dict[str, Any]:
    """The OpenAPI response of an error with this status."""
    response: dict[str, Any] = error_responses("Problem", NATIVE_API.problem_type.decode())[status]
    return response
