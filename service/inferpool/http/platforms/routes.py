"""The routes by which platforms ask whether the server is ready, and the paths that they choose."""

from __future__ import annotations

from starlette.responses import Response

from inferpool.http.route_table import RouteTable
from inferpool.repository.catalog import Catalog


def add_platforms(app: RouteTable, catalog: Catalog) -> None:
    """Give `app` the routes of platforms, except predictions."""

    @app.get("/ping", tags=["platforms"], summary="Whether the server can answer, as SageMaker asks",
             response_class=Response, responses={503: {"description": "It cannot."}})  # fmt: skip
    @app.get("/v1/endpoints/{endpoint}/deployedModels/{deployed}", include_in_schema=False,
             response_class=Response)  # fmt: skip
    async def ping() -> Response:
        """Status 200 without a body if every required model can answer, else 503."""
        await catalog.refresh()
        return Response(status_code=200 if catalog.health().ready else 503)
