"""A route that FastAPI analyses when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute
from starlette.routing import Route

from inferpool.http.asgi import Receive, Scope, Send


class DeferredRoute(Route):
    """Finds requests as FastAPI's route does; the first request, or the OpenAPI document, makes that route.

    FastAPI reads the annotations of an endpoint, and builds validators of its parameters and of its response.
    For all routes together that takes a tenth of a server's start; few servers are asked for many of them.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Take the arguments of FastAPI's `APIRoute`."""
        methods = {method.upper() for method in options["methods"] or ("GET",)}
        super().__init__(path, endpoint, methods=list(methods), name=options["name"])
        self.methods = methods  # without HEAD, as FastAPI has it
        self._options = options
        self._route: APIRoute | None = None
        self.app = self._answer

    def api_route(self) -> APIRoute:
        """FastAPI's route."""
        if self._route is None:
            self._route = APIRoute(self.path, self.endpoint, **self._options)
            self.app = self._route.app
        return self._route

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.api_route().app(scope, receive, send)
