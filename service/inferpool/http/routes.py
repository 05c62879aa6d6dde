"""The routes that are no predictions, with what all of them have in common: keys, errors and a document."""

from __future__ import annotations

import asyncio
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from inferpool import __version__
from inferpool.errors import InferpoolError, InternalError, MalformedBody, MethodNotAllowed, NotFound
from inferpool.http.access.admin_socket import ADMIN_SOCKET, LOCAL_ADMIN
from inferpool.http.access.client_certificates import KEYLESS
from inferpool.http.access.openapi import with_security
from inferpool.http.access.route_scopes import RouteScopes
from inferpool.http.asgi import Message, Receive, Scope, Send, api_of, peer_of
from inferpool.http.connection.shared import SharedState
from inferpool.http.deferred_route import DeferredRoute
from inferpool.http.explain.options import ExplanationLimits
from inferpool.http.explain.routes import add_explain
from inferpool.http.native.routes import add_native
from inferpool.http.openapi import complete
from inferpool.http.page.routes import add_page
from inferpool.http.platforms.routes import add_platforms
from inferpool.http.predict.body_buffer import too_large
from inferpool.http.predict.observations import Observations
from inferpool.http.problems import STATUSES, Headers, as_problem, problem_headers
from inferpool.http.route_table import RouteTable
from inferpool.http.v1.routes import add_v1
from inferpool.http.v2.routes import add_v2
from inferpool.observe.metrics import Metrics
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import Catalog

log = logging.getLogger(__name__)

TITLE = "Inferpool"
DESCRIPTION = """Serves exported models. `GET /models` lists the models, their inputs and outputs;
`POST /predict/{model}` predicts. Errors are `application/problem+json` with a stable `code`."""

_SHOWN_CHARACTERS = 200
"""Characters of a request's path that an error text repeats."""


class Routes(RouteTable):
    """Asks for the key that a route needs, and answers with an error of the API that the path belongs to.

    Attributes:
        route_scopes: the scope that each route needs.
    """

    route_scopes: RouteScopes

    def __init__(self, catalog: Catalog, shared: SharedState) -> None:
        """Begin without routes; the models of `catalog` are in the document."""

        async def answer(request: Request, error: Exception) -> Response:
            return _error_response(_translated(request, error), request.scope)

        handlers = dict.fromkeys((InferpoolError, HTTPException, Exception), answer)
        super().__init__(exception_handlers=handlers)
        self.router.redirect_slashes = False
        self._catalog = catalog
        self._shared = shared
        self._document: dict[str, Any] | None = None

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            if ADMIN_SOCKET in scope["state"]:
                scope["state"]["caller"] = LOCAL_ADMIN
            else:
                scope["state"]["caller"] = self._shared.gate.authorize(
                    scope["headers"],
                    self.route_scopes.needed(scope),
                    None,
                    peer_of(scope),
                    scope["state"].get(KEYLESS),
                )
            receive = _bounded(scope["headers"], receive, self._shared.predictor.max_body_bytes)
        except InferpoolError as error:
            # Before the routes: none of them, nor a part of the framework, reads a body for a stranger.
            await _error_response(error, scope)(scope, receive, send)
            return
        try:
            await self(scope, receive, send)
        except ClientDisconnect:
            pass  # its body will never be whole, and nobody reads an answer
        except Exception:
            # The client has its answer. uvicorn would log this without the id, and close the connection.
            log.exception("request %s failed", scope["state"]["request_id"])

    async def openapi(self) -> dict[str, Any]:
        """The OpenAPI document of the whole API, with the models that are ready now."""
        if self._document is None:
            # In a thread: this imports FastAPI, which then reads the annotations of all endpoints.
            self._document = await asyncio.to_thread(self._describe)
        document = complete(self._document, self._catalog)
        if self._shared.root_path:
            document["servers"] = [{"url": self._shared.root_path.decode()}]
        gate = self._shared.gate
        return with_security(document, gate.anonymous.scopes) if gate.enabled else document

    def _describe(self) -> dict[str, Any]:
        routes = [route.api_route() for route in self.routes if isinstance(route, DeferredRoute)]
        from fastapi.openapi.utils import get_openapi

        return get_openapi(title=TITLE, version=__version__, description=DESCRIPTION, routes=routes)


def make_routes(
    catalog: Catalog,
    shared: SharedState,
    metrics: Metrics,
    admin: Admin,
    explanations: ExplanationLimits,
    observations: Observations,
) -> Routes:
    """The routes for the models of `catalog`, which are changed through `admin`.

    `observations` has the samples of requests.
    """
    app = Routes(catalog, shared)
    _add_docs(app)
    add_page(app)
    add_native(app, catalog, metrics, admin, observations)
    add_v2(app, catalog, shared.predictor, admin)
    add_v1(app, catalog)
    add_platforms(app, catalog)
    add_explain(app, shared.predictor, metrics, explanations)
    app.route_scopes = RouteScopes(app.routes)
    return app


def _add_docs(app: Routes) -> None:
    """Serve the document, and the page `/docs` with all its files, which needs no access to other hosts."""

    async def read_openapi(_: Request) -> JSONResponse:
        return JSONResponse(await app.openapi())

    app.add_route("/openapi.json", read_openapi, methods=["GET"], include_in_schema=False)
    # FastAPI's default page loads its files from another host. Only the files of `fastapi_offline` are
    # used, because the package would replace the application class; it imports FastAPI, too.
    found = find_spec("fastapi_offline")
    assert found is not None
    assert found.origin is not None
    app.mount("/docs/files", StaticFiles(directory=Path(found.origin).parent / "static"))

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> HTMLResponse:
        # The addresses are relative, because a proxy may serve the application below a path of its own.
        return await asyncio.to_thread(_docs_page)


def _docs_page() -> HTMLResponse:
    import inferpool.http.fastapi_import  # noqa: F401

    # isort: split
    from fastapi.openapi.docs import get_swagger_ui_html

    return get_swagger_ui_html(
        title=TITLE,
        openapi_url="openapi.json",
        swagger_js_url="docs/files/swagger-ui-bundle.js",
        swagger_css_url="docs/files/swagger-ui.css",
        swagger_favicon_url="docs/files/favicon.png",
    )


def _bounded(headers: Headers, receive: Receive, most: int) -> Receive:
    """`receive` that takes at most `most` bytes of a body; raises BodyTooLarge if more are announced."""
    announced = next((value for name, value in headers if name == b"content-length"), b"0")
    if int(announced) > most:
        raise too_large(most)
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise too_large(most)
        return message

    return receive_bounded


def _error_response(error: Exception, scope: Scope) -> Response:
    """The response for an error, in the form of the API that the path belongs to."""
    problem = as_problem(error)
    api = api_of(scope["path"])
    status = STATUSES[problem.code]
    body = api.problem(problem, status, scope["state"]["request_id"])
    headers = {name.decode(): value.decode() for name, value in problem_headers(problem)}
    return Response(body, status, {**headers, "content-type": api.problem_type.decode()})


def _translated(request: Request, error: Exception) -> Exception:
    """The errors of Starlette as errors of this project; any other error unchanged."""
    path = request.url.path[:_SHOWN_CHARACTERS]
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, InferpoolError):
            return error.__cause__  # FastAPI was reading a body
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
