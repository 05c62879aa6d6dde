"""Imports FastAPI. Whoever starts a server imports this module before all others that use FastAPI.

FastAPI has pydantic models of everything that an OpenAPI document can contain. Building their validators
takes a tenth of a server's start, and only `/openapi.json` needs them. The first document builds them.
"""

from __future__ import annotations

from pydantic import BaseModel

# Models take this over from their base when they are defined.
BaseModel.model_config["defer_build"] = True
try:
    import fastapi  # noqa: F401
finally:
    del BaseModel.model_config["defer_build"]
