"""The part of the OpenAPI document about keys: how they are sent, and which route needs which scope."""

from __future__ import annotations

from typing import Any, Final

from inferpool.http.access.caller import PREDICT, PUBLIC, SCOPES
from inferpool.http.access.route_scopes import ROUTE_SCOPES

Document = dict[str, Any]

_SCHEMES: Final[Document] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key, or a token of the issuer."},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same key."},
}
_NAMES: Final = {scope: name for name, scope in SCOPES.items()}


def with_security(document: Document, public: int) -> Document:
    """`document` of a server that needs keys, with the scope of each route; `public` scopes need none."""
    paths = {
        path: {method: _operation(f"{method.upper()} {path}", item[method], public) for method in item}
        for path, item in document["paths"].items()
    }
    components = {**document["components"], "securitySchemes": _SCHEMES}
    return {**document, "paths": paths, "components": components}


def _operation(route: str, operation: Document, public: int) -> Document:
    # What is not in the table is the path of one model's predictions.
    needed = ROUTE_SCOPES.get(route, PREDICT)
    if needed == PUBLIC:
        return {**operation, "security": []}
    kind = "Error" if route.partition(" ")[2].startswith("/v2") else "Problem"
    refusals = {str(status): {"$ref": f"#/components/responses/{kind}{status}"} for status in (401, 403)}
    scope = [_NAMES[needed]]
    security: list[Document] = [{"bearer": scope}, {"api_key": scope}]
    if needed & public:
        security.insert(0, {})
    return {**operation, "security": security, "responses": {**operation["responses"], **refusals}}
