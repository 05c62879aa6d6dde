"""Serves the page at `/`.

The page is one file without data of this server: its script asks the routes of the API for everything, with
a key if the server has keys. So the page itself needs no key, and behind a proxy it needs no address but its
own. The policy lets a browser run the one script and apply the one style of the page, and send requests to
this server alone.
"""

from __future__ import annotations

import gzip
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from inferpool.http.accept_headers import accepts_gzip
from inferpool.http.conditional import answer_unless_known
from inferpool.http.route_table import RouteTable

_STYLE: Final = "/* style */"
_SCRIPT: Final = "/* script */"
"""What `page.html` has in place of the other files."""

_SCRIPTS: Final = ("elements", "requests", "poll", "overview", "version", "try", "manage", "start")
"""The parts of the script in their order. They are one module: each may use the names of the others."""


def add_page(app: RouteTable) -> None:
    """Give `app` the page at `/`."""
    page, policy = make_page()
    packed, tag = gzip.compress(page, mtime=0), f'W/"{sha256(page).hexdigest()[:32]}"'
    headers = {
        "content-type": "text/html; charset=utf-8",
        "cache-control": "no-cache",
        "content-security-policy": policy,
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def read_page(request: Request) -> Response:
        takes_gzip = accepts_gzip(request.headers.get("accept-encoding", ""))
        return answer_unless_known(request, page, packed if takes_gzip else None, tag, headers)


def make_page() -> tuple[bytes, str]:
    """The page and its content security policy."""
    folder = files(__package__)
    page, style, *scripts = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", *(f"{part}.js" for part in _SCRIPTS))
    )
    script = "\n".join(scripts)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # No text becomes HTML, not even by mistake: the browser refuses `innerHTML` and the like.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    content = page.replace(_STYLE, style).replace(_SCRIPT, script).encode()
    return content, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(content: str) -> str:
    """The source of a policy that allows exactly `content`."""
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
