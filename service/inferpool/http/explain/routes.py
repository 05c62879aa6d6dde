"""The routes of explanations: `/explain`, and the paths that KServe and TorchServe have for them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import Response

from inferpool.http.explain.options import ExplainQuery, ExplanationLimits
from inferpool.http.explain.schemas import ExplanationsOut
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.native.api import NATIVE_API
from inferpool.http.openapi_parts import BINARY, REQUEST_HEADERS, Document, error_responses
from inferpool.http.predict.api import InferenceApi
from inferpool.http.predict.predictor import Predictor
from inferpool.http.route_table import RouteTable
from inferpool.http.v1.api import MODELS, V1_API
from inferpool.observe.metrics import Metrics

if TYPE_CHECKING:
    from inferpool.http.explain.explanations import Explanations

_PNG: Final = "image/png"
_STATUSES: Final = ("400", "403", "404", "413", "415", "422", "429", "500", "503", "504")


def add_explain(app: RouteTable, predictor: Predictor, metrics: Metrics, limits: ExplanationLimits) -> None:
    """Give `app` the routes of explanations."""
    made: list[Explanations] = []

    async def answer(
        request: Request, api: InferenceApi, query: ExplainQuery, model: str, version: str | None
    ) -> Response:
        if not made:
            made.append(await asyncio.to_thread(_make_explanations, predictor, metrics, limits))
        return await made[0].answer(request, api, query, model, version)

    def documented(api: InferenceApi) -> dict[str, Any]:
        name = "Problem" if api is NATIVE_API else "Error"
        errors = error_responses(name, api.problem_type.decode())
        return {
            "tags": ["explain"],
            "query": ExplainQuery,
            "response_model": ExplanationsOut,
            "responses": {
                **{status: errors[status] for status in _STATUSES},
                200: {"content": {_PNG: {"schema": BINARY}}, "description": _ANSWER},
            },
            "openapi_extra": {"parameters": REQUEST_HEADERS, "requestBody": _body(api)},
        }

    native, v1 = documented(NATIVE_API), documented(V1_API)

    @app.post("/explain/{model}", summary="Explain an answer of a model's default version", **native)
    async def explain_model(request: Request, query: ExplainQuery, model: str) -> Response:
        return await answer(request, NATIVE_API, query, model, None)

    @app.post("/explain/{model}/{version}", summary="Explain an answer of a version", **native)
    async def explain_version(request: Request, query: ExplainQuery, model: str, version: str) -> Response:
        return await answer(request, NATIVE_API, query, model, version)

    @app.post("/explanations/{model}", summary="As TorchServe: the same as `/explain`", **native)
    async def torchserve_explain(request: Request, query: ExplainQuery, model: str) -> Response:
        return await answer(request, NATIVE_API, query, model, None)

    @app.post("/explanations/{model}/{version}", summary="As TorchServe, for a version", **native)
    async def torchserve_explain_version(
        request: Request, query: ExplainQuery, model: str, version: str
    ) -> Response:
        return await answer(request, NATIVE_API, query, model, version)

    @app.post(MODELS + "/{model}:explain", summary="As KServe, with the body of `/v1`", **v1)
    async def v1_explain(request: Request, query: ExplainQuery, model: str) -> Response:
        return await answer(request, V1_API, query, model, None)

    @app.post(MODELS + "/{model}/versions/{version}:explain", summary="As KServe, for a version", **v1)
    async def v1_explain_version(request: Request, query: ExplainQuery, model: str, version: str) -> Response:
        return await answer(request, V1_API, query, model, version)


def _make_explanations(predictor: Predictor, metrics: Metrics, limits: ExplanationLimits) -> Explanations:
    # Few servers explain anything, and what explains takes a while to import.
    from inferpool.http.explain.explanations import Explanations

    return Explanations(predictor, metrics, limits)


_ANSWER: Final = (
    "What each part of the input contributes; with `Accept: image/png` the heat map of a picture."
)


def _body(api: InferenceApi) -> Document:
    if api is V1_API:
        return {"required": True, "content": {JSON_TYPE: {"schema": {"type": "object"}}}}
    anything: Document = {"description": "As for `/predict`: JSON, arrays, a table, a picture or a text."}
    return {"required": True, "content": {JSON_TYPE: {"schema": anything}, "*/*": {"schema": BINARY}}}
