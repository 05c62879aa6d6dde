"""Routes and models of OpenAPI are analysed when they are first used, and then once."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from fastapi import FastAPI
from inferpool.http.body_model import BodyModel
from inferpool.http.deferred_route import DeferredRoute


class Answer(BodyModel):
    """A model of a response."""

    sum: int


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.router.route_class = DeferredRoute  # type: ignore[assignment]

    @app.get("/sums/{first}")
    async def add(first: int, second: int = 0) -> Answer:
        return Answer(sum=first + second)

    return app


def route_of(app: FastAPI) -> DeferredRoute:
    [route] = [route for route in app.routes if isinstance(route, DeferredRoute)]
    return route


async def ask(app: FastAPI, method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path)


@pytest.mark.anyio
async def test_the_first_request_analyses_a_route(app: FastAPI) -> None:
    route = route_of(app)
    assert route._route is None
    assert (await ask(app, "GET", "/sums/2?second=3")).json() == {"sum": 5}
    analysed = route.api_route()
    assert (await ask(app, "GET", "/sums/4")).json() == {"sum": 4}
    assert route.api_route() is analysed
    assert analysed.response_model is Answer


@pytest.mark.anyio
async def test_a_deferred_route_refuses_as_the_framework_does(app: FastAPI) -> None:
    assert (await ask(app, "GET", "/sums/x")).status_code == 422
    refused = await ask(app, "HEAD", "/sums/1")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


def test_a_start_builds_no_validators_of_openapi() -> None:
    code = (
        "import inferpool.app; from fastapi.openapi.models import Tag, OpenAPI;"
        " assert not Tag.__pydantic_complete__;"
        " from pydantic import BaseModel; assert 'defer_build' not in BaseModel.model_config;"
        " OpenAPI(openapi='3.1.0', info={'title': 'a', 'version': '1'}, tags=[{'name': 't'}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
