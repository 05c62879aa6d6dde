"""Imports FastAPI. A function that needs FastAPI imports this module first.

FastAPI has pydantic models of everything that an OpenAPI document can contain. Building their validators
takes long, and only `/openapi.json` needs them. The first document builds them.
"""

from __future__ import annotations

from pydantic import BaseModel

from inferpool.system.imports import no_collections

# Models take this over from their base when they are defined.
BaseModel.model_config["defer_build"] = True
try:
    with no_collections():
        import fastapi  # noqa: F401
finally:
    del BaseModel.model_config["defer_build"]
