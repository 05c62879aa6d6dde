"""The base of the models that describe bodies of requests and responses."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class BodyModel(BaseModel):
    """A model whose validator is built when it is first needed, not at the start of a server."""

    model_config = ConfigDict(defer_build=True)
