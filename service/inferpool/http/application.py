"""The web application: FastAPI for every route but predictions, which `PredictProtocol` answers itself."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from inferpool import __version__
from inferpool.errors import (
    InferpoolError,
    InternalError,
    InvalidInput,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
)
from inferpool.http.asgi import Message, Receive, Scope, Send, find_api, is_last, refuse_method
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.response_head import server_timing
from inferpool.http.docs_page import add_docs
from inferpool.http.native.api import NATIVE_API
from inferpool.http.native.schemas import (
    HealthOut,
    LiveOut,
    ModelDetail,
    Models,
    ReadyOut,
    VersionDetail,
    health_out,
    model_out,
    version_out,
)
from inferpool.http.openapi import complete
from inferpool.http.openapi_parts import error_responses
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_head import request_id_from
from inferpool.http.problems import STATUSES, as_problem, problem_headers
from inferpool.http.v2.api import PREFIX, V2_API
from inferpool.http.v2.routes import add_v2, admin_is_off
from inferpool.observe.metrics import Metrics
from inferpool.repository.catalog import Catalog, find_model

DESCRIPTION = """Serves exported models. `GET /models` says what there is and what it takes;
`POST /predict/{model}` predicts. Errors are `application/problem+json` with a stable `code`."""


class Application(FastAPI):
    """Gives every response its id and timing, and refuses other methods than POST for predictions."""

    predictor: Predictor
    read_batcher: ReadBatcher
    catalog: Catalog

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI door."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        found = find_api(scope["raw_path"].decode("latin-1"))
        if found is not None:
            await refuse_method(self.predictor, *found, scope, send)
        else:
            if scope["method"] == "HEAD":
                # As GET; the server leaves the body out, by the method in its own scope.
                scope = {**scope, "method": "GET"}
            await super().__call__(scope, receive, _signed(scope, send, self.predictor))

    def openapi(self) -> dict[str, Any]:
        """The document of the whole API, as it is served at this moment."""
        # What the framework writes does not change while it serves, and takes it a while.
        return complete(super().openapi(), self.catalog)


def make_application(
    catalog: Catalog, predictor: Predictor, read_batcher: ReadBatcher, metrics: Metrics
) -> Application:
    """The application over what is served."""
    app = Application(
        title="Inferpool",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        responses={},
    )
    app.predictor = predictor
    app.read_batcher = read_batcher
    app.catalog = catalog
    _add_errors(app)
    add_docs(app)
    _add_models(app, catalog)
    _add_health(app, catalog)
    add_v2(app, catalog, predictor)

    @app.get(
        "/metrics", tags=["health"], summary="Everything counted, for Prometheus", response_class=Response
    )
    async def read_metrics(request: Request) -> Response:
        """Prometheus text, or OpenMetrics where Accept asks for it."""
        # It takes a while where many versions are served, and predictions go on meanwhile.
        body, content_type = await asyncio.to_thread(metrics.render, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return app


def _add_models(app: FastAPI, catalog: Catalog) -> None:
    missing: dict[int | str, dict[str, Any]] = {
        404: error_responses("Problem", NATIVE_API.problem_type.decode())["404"]
    }

    # Before the versions, whose path theirs look like: a wrong method is told of these.
    @app.post("/models/{model}/load", tags=["admin"], summary="Load a model", **_refused())
    async def load_model(model: str) -> None:
        raise admin_is_off()

    @app.post("/models/{model}/unload", tags=["admin"], summary="Unload a model", **_refused())
    async def unload_model(model: str) -> None:
        raise admin_is_off()

    @app.put(
        "/models/{model}/labels/{label}",
        tags=["admin"],
        summary="Give a label to a version",
        **_refused(),
    )
    async def set_label(model: str, label: str) -> None:
        raise admin_is_off()

    @app.get("/models", tags=["models"], summary="Everything in the repository")
    async def read_models() -> Models:
        return Models.model_validate(
            {"models": [model_out(model, catalog).model_dump() for model in catalog.models().values()]}
        )

    @app.get(
        "/models/{model}", tags=["models"], summary="A model and what was measured of it", responses=missing
    )
    async def read_model(model: str) -> ModelDetail:
        return model_out(find_model(catalog, model), catalog)

    @app.get(
        "/models/{model}/{version}",
        tags=["models"],
        summary="A version, by number or label",
        responses=missing,
    )
    async def read_version(model: str, version: str) -> VersionDetail:
        return version_out(find_model(catalog, model).version(version), catalog)


def _refused() -> dict[str, Any]:
    """Options of a route that is there to say that it is not enabled."""
    return {
        "status_code": 403,
        "response_class": Response,
        "responses": {403: error_responses("Problem", NATIVE_API.problem_type.decode())["403"]},
    }


def _add_health(app: FastAPI, catalog: Catalog) -> None:
    @app.get(
        "/health",
        tags=["health"],
        summary="Whether the server can answer, and what is wrong with what",
        responses={503: {"model": HealthOut}},
    )
    async def read_health(response: Response) -> HealthOut:
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
        ready = catalog.health().ready
        response.status_code = 200 if ready else 503
        return ReadyOut(ready=ready)


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        problem = as_problem(_translated(request, error))
        path = request.scope["path"]
        api = V2_API if path == PREFIX or path.startswith(f"{PREFIX}/") else NATIVE_API
        status = STATUSES[problem.code]
        body = api.problem(problem, status, request.scope["state"]["request_id"])
        headers = {name.decode(): value.decode() for name, value in problem_headers(problem)}
        return Response(body, status, {**headers, "content-type": api.problem_type.decode()})

    for kind in (InferpoolError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _translated(request: Request, error: Exception) -> Exception:
    """The framework's own errors in our words."""
    path = request.url.path[:200]
    if isinstance(error, RequestValidationError):
        return InvalidInput("; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors()))
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return NotFound(f"nothing is served under {path}")
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow", "GET")
            return MethodNotAllowed(f"{request.method} is not for {path}", allow=allow)
        return (
            MalformedBody(str(error.detail)) if error.status_code < 500 else InternalError(str(error.detail))
        )
    return error


def _signed(scope: Scope, send: Send, predictor: Predictor) -> Send:
    """`send`, with the request's id and timing on the answer, and whether it is the connection's last."""
    began = predictor.clock()
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    request_id = scope.setdefault("state", {})["request_id"] = request_id_from(given)

    async def sign(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message["headers"],
                (b"x-request-id", request_id.encode("latin-1")),
                (b"server-timing", server_timing(0.0, 0.0, predictor.clock() - began)),
            ]
            if is_last(predictor, scope):
                message["headers"].append((b"connection", b"close"))
        await send(message)

    return sign
