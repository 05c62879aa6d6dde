"""The routes of `/v1` beside predict: the names of the models, and whether a model can answer.

The answers have the fields of KServe, of TensorFlow Serving and of OpenAI, so the clients of all three read
them.
"""

from __future__ import annotations

from typing import Any, Literal

from inferpool.http.body_model import BodyModel
from inferpool.http.route_table import RouteTable
from inferpool.http.v1.api import MODELS
from inferpool.repository.catalog import READY, Catalog, VersionView, find_model, find_ready


class V1Error(BodyModel):
    """An error of `/v1`. Clients match `code`, which is stable."""

    error: str
    code: str


class OpenAiModel(BodyModel):
    """A model as OpenAI lists it. `created` is 0, because no file says when a model was made."""

    id: str
    object: Literal["model"] = "model"
    created: Literal[0] = 0
    owned_by: Literal["inferpool"] = "inferpool"


class V1Models(BodyModel):
    """The names of the models, and the same as a list of OpenAI's."""

    models: list[str]
    object: Literal["list"] = "list"
    data: list[OpenAiModel]


class V1Status(BodyModel):
    """The state of a version, in TensorFlow Serving's words."""

    version: str
    state: str
    status: dict[str, str]


class V1Model(OpenAiModel):
    """A model that can answer, in the fields of OpenAI and KServe, with versions in TensorFlow Serving's."""

    name: str
    ready: bool = True
    model_version_status: list[V1Status]


OPENAI_MODELS = "/openai/v1/models"
"""The list again, below the prefix that KServe has for routes of OpenAI."""
_STATES = {"loading": "LOADING", "draining": "UNLOADING", "unloaded": "END", "failed": "END"}
_UNABLE: dict[int | str, dict[str, Any]] = {
    404: {"model": V1Error, "description": "`model_not_found` or `version_not_found`"},
    503: {"model": V1Error, "description": "`not_ready`"},
}


def add_v1(app: RouteTable, catalog: Catalog) -> None:
    """Give `app` the routes of `/v1`, except predict."""

    @app.get(OPENAI_MODELS, include_in_schema=False)
    @app.get(MODELS, tags=["v1"], summary="The names of the models")
    async def read_v1_models() -> V1Models:
        names = list(catalog.models())
        return V1Models(models=names, data=[OpenAiModel(id=name) for name in names])

    @app.get(MODELS + "/{model}", tags=["v1"], summary="Whether a model can answer", responses=_UNABLE)
    async def read_v1_model(model: str) -> V1Model:
        find_ready(catalog, model, None)
        versions = find_model(catalog, model).versions
        statuses = [*map(_status, versions.values())]
        return V1Model(id=model, name=model, model_version_status=statuses)

    @app.get(
        MODELS + "/{model}/versions/{version}",
        tags=["v1"],
        summary="Whether a version can answer",
        responses=_UNABLE,
    )
    async def read_v1_version(model: str, version: str) -> V1Model:
        statuses = [_status(find_ready(catalog, model, version))]
        return V1Model(id=model, name=model, model_version_status=statuses)


def _status(view: VersionView) -> V1Status:
    state = "AVAILABLE" if view.state == READY else _STATES[view.state]
    code = "OK" if view.state != "failed" else "UNKNOWN"
    return V1Status(
        version=str(view.key.version),
        state=state,
        status={"error_code": code, "error_message": view.reason if view.state == "failed" else ""},
    )
