"""Responses that a client may have already: ETag and If-None-Match (RFC 9110, 13.1.2)."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response


def answer_unless_known(
    request: Request, body: bytes, packed: bytes | None, tag: str, headers: Mapping[str, str]
) -> Response:
    """Status 304 if `request` names the entity tag `tag`, else 200 with the body.

    `packed` is `body` as gzip, if the client takes gzip; None otherwise. The tag must be a weak one, because
    it names both forms of the body.
    """
    own = {**headers, "etag": tag, "vary": "accept-encoding"}
    if is_known(request.headers.get("if-none-match", ""), tag):
        own.pop("content-type", None)
        return Response(status_code=304, headers=own)
    if packed is None:
        return Response(body, headers=own)
    return Response(packed, headers={**own, "content-encoding": "gzip"})


def is_known(if_none_match: str, tag: str) -> bool:
    """Return whether the header If-None-Match names `tag`; the comparison is the weak one."""
    named = [name.strip().removeprefix("W/") for name in if_none_match.split(",")]
    return "*" in named or tag.removeprefix("W/") in named
