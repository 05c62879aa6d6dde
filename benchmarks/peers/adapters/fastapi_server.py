"""FastAPI in the style of its tutorial: a pydantic model for JSON, no batching."""

from __future__ import annotations

from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile
from pydantic import BaseModel
from shared import Model, arguments

given = arguments()
model = Model(given.model, given.kind)
app = FastAPI()


class Row(BaseModel):
    """A row of numbers."""

    inputs: list[list[float]]


class Image(BaseModel):
    """A picture as numbers: channels, lines, columns."""

    inputs: list[list[list[list[float]]]]


class Text(BaseModel):
    """A sentence."""

    inputs: list[str]


class Prediction(BaseModel):
    """The first output."""

    outputs: list[list[float]]


async def predict_row(body: Row) -> Prediction:
    """A row as JSON."""
    return Prediction(outputs=model.run([model.row(body.inputs)]).tolist())


async def predict_image(body: Image) -> Prediction:
    """A picture as JSON."""
    return Prediction(outputs=model.run([model.row(body.inputs)]).tolist())


async def predict_text(body: Text) -> Prediction:
    """Sentences as JSON."""
    return Prediction(outputs=model.run(body.inputs).tolist())


async def predict_file(file: UploadFile) -> Prediction:
    """A picture, or the bytes of a tensor, as a form's file."""
    return Prediction(outputs=model.run([model.decode(await file.read())]).tolist())


handlers: dict[str, Any] = {"json": predict_row, "text": predict_text}
handler = handlers.get(given.kind, predict_file)
if given.kind == "json" and len(model.shape) == 3:
    handler = predict_image
app.post("/predict")(handler)
if __name__ == "__main__":
    uvicorn.run(
        "fastapi_server:app",
        host="127.0.0.1",
        port=given.port,
        workers=given.workers,
        access_log=False,
        log_level="warning",
    )
