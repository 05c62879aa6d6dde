"""FastAPI without pydantic: the route takes the request, orjson reads it; no batching."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI, Request, Response
from shared import Model, arguments

given = arguments()
model = Model(given.model, given.kind)
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Answer every request as a prediction."""
    [answer] = model.answers([await request.body()])
    return Response(answer, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        "fastapi_bare_server:app",
        host="127.0.0.1",
        port=given.port,
        workers=given.workers,
        access_log=False,
        log_level="warning",
    )
