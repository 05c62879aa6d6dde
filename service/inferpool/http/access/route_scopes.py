"""The scope of every route, in one table. The server does not start if a route is missing here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final

from starlette.routing import BaseRoute, Match, Mount, Route

from inferpool.http.access.caller import ADMIN, ANY_KEY, METRICS, PREDICT, PUBLIC, READ

ROUTE_SCOPES: Final[Mapping[str, int]] = {
    # Predictions: `PredictProtocol` answers them, and asks for the scope before it reads a body.
    "POST /predict": PREDICT,
    "POST /predict/{model}": PREDICT,
    "POST /predict/{model}/{version}": PREDICT,
    "POST /v2/models/{model}/infer": PREDICT,
    "POST /v2/models/{model}/versions/{version}/infer": PREDICT,
    "POST /v1/models/{model}:predict": PREDICT,
    "POST /v1/models/{model}/versions/{version}:predict": PREDICT,
    "POST /v1/models/{model}/labels/{label}:predict": PREDICT,
    "POST /invocations": PREDICT,
    "POST /score": PREDICT,
    "POST /v1/endpoints/{endpoint}/deployedModels/{deployed}:predict": PREDICT,
    "POST /v1/endpoints/{endpoint}/deployedModels/{deployed}:rawPredict": PREDICT,
    "POST /v1/embeddings": PREDICT,
    "POST /v1/rerank": PREDICT,
    "POST /v2/rerank": PREDICT,
    "POST /v1/score": PREDICT,
    "POST /openai/v1/embeddings": PREDICT,
    "POST /openai/v1/rerank": PREDICT,
    "POST /openai/v1/score": PREDICT,
    # Explanations run the model as predictions do.
    "POST /explain/{model}": PREDICT,
    "POST /explain/{model}/{version}": PREDICT,
    "POST /explanations/{model}": PREDICT,
    "POST /explanations/{model}/{version}": PREDICT,
    "POST /v1/models/{model}:explain": PREDICT,
    "POST /v1/models/{model}/versions/{version}:explain": PREDICT,
    # The page for people. It is one file that holds no data: a browser sends no key with an address, and the
    # page asks for one.
    "GET /": PUBLIC,
    # The native API.
    "GET /models": READ,
    "GET /models/{model}": READ,
    "GET /models/{model}/{version}": READ,
    "GET /models/{model}/{version}/samples": READ,
    "GET /status": READ,
    "POST /models/{model}/load": ADMIN,
    "POST /models/{model}/unload": ADMIN,
    "POST /models/{model}/rollback": ADMIN,
    "PUT /models/{model}/labels/{label}": ADMIN,
    "DELETE /models/{model}/labels/{label}": ADMIN,
    "GET /models/{model}/traffic": READ,
    "PUT /models/{model}/traffic": ADMIN,
    "DELETE /models/{model}/traffic": ADMIN,
    "GET /samples": ADMIN,
    "DELETE /samples": ADMIN,
    "GET /jobs": ADMIN,
    "GET /jobs/{job}": ADMIN,
    "DELETE /jobs/{job}": ADMIN,
    "GET /health": PUBLIC,
    "GET /health/live": PUBLIC,
    "GET /health/ready": PUBLIC,
    "GET /metrics": METRICS,
    "GET /docs": READ,
    "GET /docs/files": READ,
    "GET /openapi.json": READ,
    # The protocol V1, and what platforms ask for.
    "GET /v1/models": READ,
    "GET /openai/v1/models": READ,
    "GET /v1/models/{model}": READ,
    "GET /v1/models/{model}/versions/{version}": READ,
    "GET /ping": PUBLIC,
    "GET /v1/endpoints/{endpoint}/deployedModels/{deployed}": PUBLIC,
    # The Open Inference Protocol.
    "GET /v2": READ,
    "GET /v2/": READ,
    "GET /v2/health/live": PUBLIC,
    "GET /v2/health/ready": PUBLIC,
    "GET /v2/models": READ,
    "GET /v2/models/stats": READ,
    "GET /v2/models/{model}": READ,
    "GET /v2/models/{model}/ready": READ,
    "GET /v2/models/{model}/config": READ,
    "GET /v2/models/{model}/stats": READ,
    "GET /v2/models/{model}/versions/{version}": READ,
    "GET /v2/models/{model}/versions/{version}/ready": READ,
    "GET /v2/models/{model}/versions/{version}/config": READ,
    "GET /v2/models/{model}/versions/{version}/stats": READ,
    "POST /v2/repository/index": READ,
    "POST /v2/repository/models/{model}/load": ADMIN,
    "POST /v2/repository/models/{model}/unload": ADMIN,
}
"""Method and path of each route, and the scope that it needs."""


class RouteScopes:
    """Finds the scope that a request of the application needs."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        """Read the scopes of `routes`; raises LookupError if the table lacks one of them."""
        self._routes = [(route, _scopes_of(route)) for route in routes]

    def needed(self, scope: MutableMapping[str, Any]) -> int:
        """Return the scope that the request `scope` needs; `ANY_KEY` if no route matches.

        The routes are tried in the router's own order and with its own match, so that the two cannot
        disagree about a path.
        """
        partly: int | None = None
        for route, scopes in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return scopes.get(scope["method"], ANY_KEY)
            if match is Match.PARTIAL and partly is None:
                # The answer is 405 and names the methods: whoever may use any of them may know.
                partly = min(scopes.values())
        return ANY_KEY if partly is None else partly


def _scopes_of(route: BaseRoute) -> dict[str, int]:
    """Return the scopes of a route by its methods."""
    if isinstance(route, Mount):
        return dict.fromkeys(("GET", "HEAD"), _scope_of(f"GET {route.path}"))
    if not isinstance(route, Route):
        raise LookupError(f"{route!r} is no route of a kind that can be given a scope")
    methods = sorted((route.methods or {"GET"}) - {"HEAD"})
    scopes = {method: _scope_of(f"{method} {route.path}") for method in methods}
    return {**scopes, "HEAD": scopes["GET"]} if "GET" in scopes else scopes


def _scope_of(name: str) -> int:
    scope = ROUTE_SCOPES.get(name)
    if scope is None:
        raise LookupError(f'the route "{name}" has no scope; state it in {__name__}.ROUTE_SCOPES')
    return scope
