"""The audit trail: a line in the log for each admin act, with who asked, for what, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request

from inferpool.errors import InferpoolError
from inferpool.http.access.caller import Caller

log = logging.getLogger(__name__)

T = TypeVar("T")


async def audited(request: Request, act: str, work: Awaitable[T], outcome: Callable[[T], str]) -> T:
    """Do `work`, and log the `act` with its `outcome`; returns and raises what `work` does."""
    try:
        result = await work
    except InferpoolError as error:
        _write(request, act, f"refused: {error.detail}")
        raise
    except BaseException as error:
        _write(request, act, f"failed with {type(error).__name__}")
        raise
    _write(request, act, outcome(result))
    return result


def _write(request: Request, act: str, outcome: str) -> None:
    caller: Caller = request.scope["state"]["caller"]
    log.info(
        "audit: %s: %s",
        act,
        outcome,
        extra={
            "key": caller.key_id or None,
            "tenant": caller.tenant or None,
            "request_id": request.scope["state"]["request_id"],
        },
    )
