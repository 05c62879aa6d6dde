"""The web application: FastAPI for every route but predictions, which `PredictProtocol` answers itself."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from inferpool import __version__
from inferpool.errors import (
    Forbidden,
    InferpoolError,
    InternalError,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
)
from inferpool.http.access.admin_socket import ADMIN_SOCKET, LOCAL_ADMIN
from inferpool.http.access.client_certificates import KEYLESS
from inferpool.http.access.cors import CorsPolicy, is_preflight, origin_of
from inferpool.http.access.openapi import with_security
from inferpool.http.access.route_scopes import RouteScopes
from inferpool.http.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    api_of,
    caller_of,
    find_api,
    is_last,
    peer_of,
    refuse_method,
)
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.forwarded import FORWARDED_FROM, TENANT
from inferpool.http.connection.shared import SharedState
from inferpool.http.deferred_route import DeferredRoute
from inferpool.http.explain.routes import ExplanationLimits, add_explain
from inferpool.http.media_types import JSON_TYPE, MEANT_AS_JSON
from inferpool.http.native.routes import add_native
from inferpool.http.openapi import complete
from inferpool.http.page.routes import add_page
from inferpool.http.platforms.routes import add_platforms
from inferpool.http.predict.observations import Observations
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_id import request_id_from
from inferpool.http.predict.response import server_timing
from inferpool.http.problems import STATUSES, Headers, as_problem, problem_headers
from inferpool.http.v1.routes import add_v1
from inferpool.http.v2.routes import add_v2
from inferpool.http.validation_errors import refusal_of
from inferpool.observe.metrics import Metrics
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import Catalog

log = logging.getLogger(__name__)

DESCRIPTION = """Serves exported models. `GET /models` lists the models, their inputs and outputs;
`POST /predict/{model}` predicts. Errors are `application/problem+json` with a stable `code`."""

_WITH_BODIES = ("POST", "PUT")
_CONTENT_TYPE = b"content-type"
_SHOWN_CHARACTERS = 200
"""Characters of a request's path that an error text repeats."""


class Application(FastAPI):
    """Adds the id and timing to every response, and refuses all methods but POST for predictions.

    Attributes:
        predictor: answers the predict requests of every API.
        shared: what all connections share.
        read_batcher: reads from the connections of the server.
        catalog: the models that are served.
        route_scopes: the scope that each route needs.
    """

    predictor: Predictor
    shared: SharedState
    read_batcher: ReadBatcher
    catalog: Catalog
    route_scopes: RouteScopes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        cors = self.shared.cors
        if cors is not None:
            origin = origin_of(scope["headers"])
            send = _crossing(send, cors.headers(origin))
            if is_preflight(scope["method"], scope["headers"]):
                # Before anything asks for a key: a browser sends none with a preflight.
                await _answer_preflight(cors, origin or b"", scope, _signed(scope, send, self.predictor))
                return
        if scope["path"] == "/docs/":
            # Relative, because a proxy may serve the application below a path, a name or a scheme of its own.
            response = RedirectResponse("../docs")
            await response(scope, receive, _signed(scope, send, self.predictor))
            return
        found = find_api(scope["raw_path"].decode("latin-1"))
        if found is not None:
            await refuse_method(self.predictor, self.shared.gate, *found, scope, send)
        else:
            if scope["method"] == "HEAD":
                # The routes answer HEAD as GET; the server omits the body, because its own scope says HEAD.
                scope = {**scope, "method": "GET"}
            elif scope["method"] in _WITH_BODIES:
                scope = {**scope, "headers": _announced_as_json(scope["headers"])}
            send = _signed(scope, send, self.predictor)
            try:
                if ADMIN_SOCKET in scope["state"]:
                    scope["state"]["caller"] = LOCAL_ADMIN
                else:
                    scope["state"]["caller"] = self.shared.gate.authorize(
                        scope["headers"],
                        self.route_scopes.needed(scope),
                        None,
                        peer_of(scope),
                        scope["state"].get(KEYLESS),
                    )
            except InferpoolError as error:
                # Before the routes: none of them, nor a part of the framework, reads a body for a stranger.
                await _error_response(error, scope)(scope, receive, send)
                return
            try:
                await super().__call__(scope, receive, send)
            except ClientDisconnect:
                pass  # its body will never be whole, and nobody reads an answer
            except Exception:
                # The client has its answer. uvicorn would log this without the id, and close the connection.
                log.exception("request %s failed", scope["state"]["request_id"])

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document of the whole API, with the models that are ready now."""
        # FastAPI's own document is slow to make and does not change.
        if self.openapi_schema is None:
            routes = [route.api_route() for route in self.routes if isinstance(route, DeferredRoute)]
            self.openapi_schema = get_openapi(
                title=self.title, version=self.version, description=self.description, routes=routes
            )
        document = complete(self.openapi_schema, self.catalog)
        if self.shared.root_path:
            document["servers"] = [{"url": self.shared.root_path.decode()}]
        gate = self.shared.gate
        return with_security(document, gate.anonymous.scopes) if gate.enabled else document


def make_application(
    catalog: Catalog,
    shared: SharedState,
    read_batcher: ReadBatcher,
    metrics: Metrics,
    admin: Admin,
    explanations: ExplanationLimits,
    observations: Observations,
) -> Application:
    """The application that serves the models of `catalog`, and changes them through `admin`.

    `observations` has the samples of requests.
    """
    app = Application(
        title="Inferpool",
        version=__version__,
        description=DESCRIPTION,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses={},
    )
    app.router.route_class = DeferredRoute  # type: ignore[assignment]
    app.predictor = shared.predictor
    app.shared = shared
    app.read_batcher = read_batcher
    app.catalog = catalog
    _add_errors(app)
    _add_docs_page(app)
    add_page(app)
    metrics.process_registry()  # so that the first page of metrics holds up no request
    add_native(app, catalog, metrics, admin, observations)
    add_v2(app, catalog, shared.predictor, admin)
    add_v1(app, catalog)
    add_platforms(app, catalog)
    add_explain(app, shared.predictor, metrics, explanations)
    app.route_scopes = RouteScopes(app.routes)
    return app


def _add_docs_page(app: FastAPI) -> None:
    """Serve the page `/docs` with all its files, so that it works without access to other hosts."""
    # FastAPI's default page loads its files from another host. Only the files of `fastapi_offline` are
    # used, because the package would replace the application class.
    app.mount("/docs/files", StaticFiles(directory=Path(str(files("fastapi_offline") / "static"))))

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> HTMLResponse:
        # The addresses are relative, because a proxy may serve the application below a path of its own.
        return get_swagger_ui_html(
            title=app.title,
            openapi_url="openapi.json",
            swagger_js_url="docs/files/swagger-ui-bundle.js",
            swagger_css_url="docs/files/swagger-ui.css",
            swagger_favicon_url="docs/files/favicon.png",
        )


def _add_errors(app: FastAPI) -> None:
    """Answer every exception of a route with an error of the API that the path belongs to."""

    async def answer(request: Request, error: Exception) -> Response:
        return _error_response(_translated(request, error), request.scope)

    for kind in (InferpoolError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _error_response(error: Exception, scope: Scope) -> Response:
    """The response for an error, in the form of the API that the path belongs to."""
    problem = as_problem(error)
    api = api_of(scope["path"])
    status = STATUSES[problem.code]
    body = api.problem(problem, status, scope["state"]["request_id"])
    headers = {name.decode(): value.decode() for name, value in problem_headers(problem)}
    return Response(body, status, {**headers, "content-type": api.problem_type.decode()})


def _translated(request: Request, error: Exception) -> Exception:
    """The errors of FastAPI and Starlette as errors of this project; any other error unchanged."""
    path = request.url.path[:_SHOWN_CHARACTERS]
    if isinstance(error, RequestValidationError):
        return refusal_of(error)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return NotFound(f"no route matches {path}; /docs lists the routes")
        if error.status_code == 405:
            allow = ", ".join(_methods(request))
            return MethodNotAllowed(f"{path} does not take {request.method}; use {allow}", allow=allow)
        if error.status_code < 500:
            return MalformedBody("the body is not JSON in UTF-8; send it without a Content-Encoding")
        return InternalError(str(error.detail))
    return error


def _methods(request: Request) -> list[str]:
    """The methods that the path of a request takes; a route knows only its own."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            methods.update(getattr(route, "methods", None) or ())
    if "GET" in methods or not methods:  # without any it is a file
        methods.update(("GET", "HEAD"))
    return sorted(methods)


def _crossing(send: Send, headers: Headers) -> Send:
    """`send` that adds the headers for pages of other origins."""

    async def cross(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return cross


async def _answer_preflight(cors: CorsPolicy, origin: bytes, scope: Scope, send: Send) -> None:
    """Tell a browser whether a page of `origin` may send a request; such a question counts as no request."""
    if cors.allows(origin):
        status, body = 204, b""
        headers = cors.preflight_headers(scope["headers"])
    else:
        shown = origin[:_SHOWN_CHARACTERS].decode("latin-1")
        error = Forbidden(f'pages of the origin "{shown}" may not use this server; see --cors-allow-origin')
        api = api_of(scope["path"])
        status = STATUSES[error.code]
        body = api.problem(error, status, scope["state"]["request_id"])
        headers = [(b"content-type", api.problem_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _announced_as_json(headers: Headers) -> Headers:
    """`headers`, with the media type of JSON in place of none, or of what curl sends by default."""
    given = next((value for name, value in headers if name == _CONTENT_TYPE), b"").decode("latin-1")
    if given.partition(";")[0].strip().lower() not in MEANT_AS_JSON:
        return headers
    kept = [header for header in headers if header[0] != _CONTENT_TYPE]
    return [*kept, (_CONTENT_TYPE, JSON_TYPE.encode())]


def _signed(scope: Scope, send: Send, predictor: Predictor) -> Send:
    """`send` that adds the request id, the timing and, for the last response, `connection: close`."""
    began = predictor.clock()
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    request_id = scope.setdefault("state", {})["request_id"] = request_id_from(given)

    async def sign(message: Message) -> None:
        if message["type"] == "http.response.start":
            state = scope["state"]
            if FORWARDED_FROM in state and "caller" in state:
                message["headers"] = [
                    *message["headers"],
                    (TENANT, quote(caller_of(scope).tenant, safe="").encode()),
                ]
            message["headers"] = [
                *message["headers"],
                (b"x-request-id", request_id.encode("latin-1")),
                (b"server-timing", server_timing(0.0, 0.0, predictor.clock() - began)),
            ]
            if is_last(predictor, scope):
                message["headers"].append((b"connection", b"close"))
        await send(message)

    return sign
