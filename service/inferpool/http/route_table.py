"""Collects the routes that are no predictions, in the words of FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.applications import Starlette

from inferpool.http.deferred_route import DeferredRoute

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class RouteTable(Starlette):
    """Takes routes as a `FastAPI` does, and leaves them to FastAPI only where they need it."""

    def get(self, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Decorate the endpoint of a route; `options` are those of `DeferredRoute`."""
        return self._adding(path, "GET", options)

    def post(self, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Decorate the endpoint of a route for POST."""
        return self._adding(path, "POST", options)

    def put(self, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Decorate the endpoint of a route for PUT."""
        return self._adding(path, "PUT", options)

    def delete(self, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Decorate the endpoint of a route for DELETE."""
        return self._adding(path, "DELETE", options)

    def add_api_route(
        self, path: str, endpoint: Callable[..., Any], method: str = "GET", **options: Any
    ) -> None:
        """Add one route."""
        self.router.routes.append(DeferredRoute(path, endpoint, [method], **options))

    def _adding(self, path: str, method: str, options: dict[str, Any]) -> Callable[[Endpoint], Endpoint]:
        def add(endpoint: Endpoint) -> Endpoint:
            self.add_api_route(path, endpoint, method, **options)
            return endpoint

        return add
