"""The traffic routes: a share of a model's requests for a canary, and copies of them for a shadow."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from inferpool.errors import InvalidInput
from inferpool.http.access.audit import audited
from inferpool.http.native.api import NATIVE_API
from inferpool.http.native.traffic_schemas import CanaryBody, TrafficBody, TrafficOut, traffic_out
from inferpool.http.openapi_parts import error_responses
from inferpool.http.route_table import RouteTable
from inferpool.observe.metrics import Metrics
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import Catalog, find_model
from inferpool.repository.traffic_rules import plan_traffic

_NO_CANARY = CanaryBody(version=1, share=0.0)


def add_traffic(app: RouteTable, catalog: Catalog, metrics: Metrics, admin: Admin) -> None:
    """Give `app` the traffic routes."""

    @app.get(
        "/models/{model}/traffic",
        tags=["models"],
        summary="A model's canary and shadow, and what is counted of them",
        responses=_errors("404"),
    )
    async def read_traffic(model: str) -> TrafficOut:
        return traffic_out(find_model(catalog, model), metrics)

    @app.put(
        "/models/{model}/traffic",
        tags=["admin"],
        summary="Share the requests that name no version out: a canary, a shadow, or both",
        responses=_errors("400", "403", "404", "409", "415", "422"),
    )
    async def set_traffic(request: Request, model: str, body: TrafficBody) -> TrafficOut:
        """Takes the place of what was set before. Counts begin at zero."""

        async def work() -> TrafficOut:
            if body.canary is None and body.shadow is None:
                raise InvalidInput("neither a canary nor a shadow; DELETE ends both", field="canary")
            canary, shadow = body.canary or _NO_CANARY, body.shadow
            planned = plan_traffic(
                find_model(catalog, model),
                canary=None if body.canary is None else canary.version,
                share=canary.share,
                by=canary.by,
                least_requests=canary.requests,
                shadow=None if shadow is None else shadow.version,
                shadow_share=1.0 if shadow is None else shadow.share,
            )
            await admin.set_traffic(model, planned)
            return traffic_out(find_model(catalog, model), metrics)

        return await audited(request, f"traffic {model}: {_described(body)}", work(), lambda _: "done")

    @app.delete(
        "/models/{model}/traffic",
        tags=["admin"],
        summary="End the canary and the shadow: the default version answers again",
        responses=_errors("403", "404"),
    )
    async def end_traffic(request: Request, model: str) -> TrafficOut:
        async def work() -> TrafficOut:
            find_model(catalog, model)
            await admin.set_traffic(model, None)
            return traffic_out(find_model(catalog, model), metrics)

        return await audited(request, f"end the traffic of {model}", work(), lambda _: "done")


def _described(body: TrafficBody) -> str:
    parts = []
    if body.canary is not None:
        parts.append(f"canary {body.canary.version} with {body.canary.share:g} by {body.canary.by!r:.100}")
    if body.shadow is not None:
        parts.append(f"shadow {body.shadow.version} with {body.shadow.share:g}")
    return ", ".join(parts) or "nothing"


def _errors(*statuses: str) -> dict[int | str, dict[str, Any]]:
    documented = error_responses("Problem", NATIVE_API.problem_type.decode())
    return {int(status): documented[status] for status in statuses}
