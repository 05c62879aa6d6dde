"""Why entries are dropped, and what their results say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from inferpool.errors import DeadlineExceeded, Draining, InferpoolError, ModelFailed, NotReady

DROPPED: Final[dict[str, Callable[[], InferpoolError]]] = {
    "deadline": lambda: DeadlineExceeded("the deadline passed before the model could run"),
    "disconnected": lambda: InferpoolError("the client is gone"),
    "draining": lambda: Draining("the server is shutting down"),
    "lost": lambda: NotReady("every instance of this version is lost"),
    "unbatched": lambda: ModelFailed("the request has more rows than the model can run"),
}
"""By reason, as `dropped_entries_total` has them: what makes the error of such a result."""
