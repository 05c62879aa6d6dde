"""A route that FastAPI analyses when it is first used, if FastAPI has to read anything of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inferpool.http.asgi import Receive, Scope, Send
from inferpool.http.media_types import JSON_TYPE

if TYPE_CHECKING:
    # Few servers are asked for a route that needs FastAPI, whose import takes a tenth of a second.
    from fastapi.routing import APIRoute

_PLAIN: Final = ("str", "Request", "Response")
"""The annotations of parameters that need no FastAPI: parts of the path, the request, what is answered."""


class DeferredRoute(Route):
    """Finds requests as FastAPI's route does.

    An endpoint is called without FastAPI if it takes only parts of the path, the request and a response that
    it may change, and returns a pydantic model or a response. For every other endpoint, and for the OpenAPI
    document, FastAPI reads the annotations and builds validators; that happens once, in a thread.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        methods: Iterable[str],
        name: str | None = None,
        query: type[BaseModel] | None = None,
        **options: Any,
    ) -> None:
        """`query` is the model of the endpoint's parameter of this name: the query of the URL.

        `options` are those of FastAPI's `APIRoute`.
        """
        methods = {method.upper() for method in methods}
        super().__init__(path, endpoint, methods=list(methods), name=name)
        self.methods = methods  # without HEAD, as FastAPI has it
        self._query = query
        self._options = options
        self._route: APIRoute | None = None
        self._parameters: dict[str, str] = dict(endpoint.__annotations__)
        returned = self._parameters.pop("return", "None")
        is_plain = (
            set(self._parameters.values()) <= {*_PLAIN}
            and returned.isidentifier()
            and returned not in ("None", "Any")
        )
        self.app = self._answer if is_plain else self._answer_analysed

    def api_route(self) -> APIRoute:
        """FastAPI's route. The first call takes a while."""
        if self._route is None:
            import inferpool.http.fastapi_import  # noqa: F401

            # isort: split
            from fastapi import Query
            from fastapi.routing import APIRoute

            if self._query is not None:
                self.endpoint.__annotations__["query"] = Annotated[self._query, Query()]
            methods = sorted(self.methods or ())
            self._route = APIRoute(self.path, self.endpoint, methods=methods, name=self.name, **self._options)
        return self._route

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request without FastAPI, as FastAPI would."""
        changed = Response(status_code=self._options.get("status_code") or 200)
        del changed.headers["content-length"]
        given: dict[str, Any] = {"Request": Request(scope, receive, send), "Response": changed}
        parts = scope["path_params"]
        answer = await self.endpoint(
            **{name: parts[name] if kind == "str" else given[kind] for name, kind in self._parameters.items()}
        )
        if isinstance(answer, BaseModel):
            exclude_none = self._options.get("response_model_exclude_none", False)
            body = answer.model_dump_json(by_alias=True, exclude_none=exclude_none)
            response = Response(body, changed.status_code, media_type=JSON_TYPE)
            response.headers.raw.extend(changed.headers.raw)
        else:
            response = answer
        await response(scope, receive, send)

    async def _answer_analysed(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._route is None:
            await asyncio.to_thread(self.api_route)
        from fastapi.exceptions import RequestValidationError
        from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware

        from inferpool.http.validation_errors import refusal_of

        try:
            await AsyncExitStackMiddleware(self.api_route().app)(scope, receive, send)
        except RequestValidationError as error:
            raise refusal_of(error) from None
