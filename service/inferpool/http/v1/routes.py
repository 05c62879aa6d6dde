"""The routes of `/v1` beside predict: the names of the models, and whether a model can answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from inferpool.http.v1.api import MODELS
from inferpool.repository.catalog import READY, Catalog, VersionView, find_model, find_ready


class V1Error(BaseModel):
    """An error of `/v1`. Clients match `code`, which is stable."""

    error: str
    code: str


class V1Models(BaseModel):
    """The names of the models."""

    models: list[str]


class V1Status(BaseModel):
    """The state of a version, in TensorFlow Serving's words."""

    version: str
    state: str
    status: dict[str, str]


class V1Model(BaseModel):
    """A model that can answer: KServe's fields, and the versions as TensorFlow Serving lists them."""

    name: str
    ready: bool = True
    model_version_status: list[V1Status]


_STATES = {"loading": "LOADING", "draining": "UNLOADING", "unloaded": "END", "failed": "END"}
_UNABLE: dict[int | str, dict[str, Any]] = {
    404: {"model": V1Error, "description": "`model_not_found` or `version_not_found`"},
    503: {"model": V1Error, "description": "`not_ready`"},
}


def add_v1(app: FastAPI, catalog: Catalog) -> None:
    """Give `app` the routes of `/v1`, except predict."""

    @app.get(MODELS, tags=["v1"], summary="The names of the models")
    async def read_v1_models() -> V1Models:
        return V1Models(models=list(catalog.models()))

    @app.get(MODELS + "/{model}", tags=["v1"], summary="Whether a model can answer", responses=_UNABLE)
    async def read_v1_model(model: str) -> V1Model:
        find_ready(catalog, model, None)
        versions = find_model(catalog, model).versions
        return V1Model(name=model, model_version_status=[*map(_status, versions.values())])

    @app.get(
        MODELS + "/{model}/versions/{version}",
        tags=["v1"],
        summary="Whether a version can answer",
        responses=_UNABLE,
    )
    async def read_v1_version(model: str, version: str) -> V1Model:
        return V1Model(name=model, model_version_status=[_status(find_ready(catalog, model, version))])


def _status(view: VersionView) -> V1Status:
    state = "AVAILABLE" if view.state == READY else _STATES[view.state]
    code = "OK" if view.state != "failed" else "UNKNOWN"
    return V1Status(
        version=str(view.key.version),
        state=state,
        status={"error_code": code, "error_message": view.reason if view.state == "failed" else ""},
    )
