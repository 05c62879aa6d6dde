"""The page that shows the API, with every file that it needs: it works where no other host is reached."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles


def add_docs(app: FastAPI) -> None:
    """Let `app` answer for the page `/docs` and for the files that it names."""
    # FastAPI's default takes them from another host. The package that brings them makes an application of
    # its own kind; its files alone are wanted.
    app.mount("/docs/files", StaticFiles(directory=Path(str(files("fastapi_offline") / "static"))))

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> HTMLResponse:
        # Relative, for a proxy may serve all of this below a path of its own.
        return get_swagger_ui_html(
            title=app.title,
            openapi_url="openapi.json",
            swagger_js_url="docs/files/swagger-ui-bundle.js",
            swagger_css_url="docs/files/swagger-ui.css",
            swagger_favicon_url="docs/files/favicon.png",
        )
