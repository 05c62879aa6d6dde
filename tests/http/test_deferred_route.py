"""FastAPI analyses routes when they are first used, then once, and only those that need it."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from inferpool.errors import InvalidInput
from inferpool.http.body_model import BodyModel
from inferpool.http.deferred_route import DeferredRoute
from inferpool.http.route_table import RouteTable
from starlette.requests import Request
from starlette.responses import Response


class Answer(BodyModel):
    """A model of a response."""

    sum: int


class Named(BodyModel):
    """A model of a response that says whom it greets."""

    name: str
    note: str | None = None


@pytest.fixture
def app() -> RouteTable:
    app = RouteTable()

    @app.get("/sums/{first}")
    async def add(first: int, second: int = 0) -> Answer:
        return Answer(sum=first + second)

    return app


@pytest.fixture
def plain() -> RouteTable:
    app = RouteTable()

    @app.get("/names/{name}", response_model_exclude_none=True)
    async def greet(name: str, request: Request, response: Response) -> Named:
        response.status_code = 203
        response.headers["location"] = request.scope["raw_path"].decode()
        return Named(name=name)

    return app


def route_of(app: RouteTable) -> DeferredRoute:
    [route] = [route for route in app.routes if isinstance(route, DeferredRoute)]
    return route


async def ask(app: RouteTable, method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path)


@pytest.mark.anyio
async def test_the_first_request_analyses_a_route(app: RouteTable) -> None:
    route = route_of(app)
    assert route._route is None
    assert (await ask(app, "GET", "/sums/2?second=3")).json() == {"sum": 5}
    analysed = route.api_route()
    assert (await ask(app, "GET", "/sums/4")).json() == {"sum": 4}
    assert route.api_route() is analysed
    assert analysed.response_model is Answer


@pytest.mark.anyio
async def test_a_deferred_route_refuses_what_the_framework_refuses(app: RouteTable) -> None:
    with pytest.raises(InvalidInput, match='"first" is "x"'):  # the application answers it
        await ask(app, "GET", "/sums/x")
    refused = await ask(app, "HEAD", "/sums/1")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


@pytest.mark.anyio
async def test_fastapi_does_not_analyse_a_route_that_takes_only_parts_of_its_path(plain: RouteTable) -> None:
    answer = await ask(plain, "GET", "/names/J%C3%BCrg")
    assert (answer.status_code, answer.json()) == (203, {"name": "J\u00fcrg"})
    assert answer.headers["location"] == "/names/J%C3%BCrg"
    assert answer.headers["content-type"] == "application/json"
    assert route_of(plain)._route is None


@pytest.mark.parametrize(
    "first",
    [
        "import inferpool.http.fastapi_import",
        "from inferpool.http import deferred_route as d; d.DeferredRoute('/', lambda:0, ['GET']).api_route()",
        "from inferpool.http.routes import _docs_page; _docs_page()",
    ],
)
def test_no_import_of_fastapi_builds_validators_of_openapi(first: str) -> None:
    code = (
        f"{first}; from fastapi.openapi.models import Tag, OpenAPI;"
        " assert not Tag.__pydantic_complete__;"
        " from pydantic import BaseModel; assert 'defer_build' not in BaseModel.model_config;"
        " OpenAPI(openapi='3.1.0', info={'title': 'a', 'version': '1'}, tags=[{'name': 't'}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
