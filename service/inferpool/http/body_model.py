"""The base of the models that describe bodies of requests and responses."""

from __future__ import annotations

import warnings

from pydantic import BaseModel, ConfigDict

# FastAPI gives the parameters of its routes such aliases, and keeps pydantic's warning from the log while it
# analyses them. It does not expect that validators are built later.
warnings.filterwarnings("ignore", "The 'alias' attribute with value '(body|query)' was provided")


class BodyModel(BaseModel):
    """A model whose validator is built when it is first needed, not at the start of a server."""

    model_config = ConfigDict(defer_build=True)
