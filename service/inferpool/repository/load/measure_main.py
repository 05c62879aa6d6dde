"""The main of the process that proves and measures one version, which `measuring_process` starts.

It finds the plan that is kept or makes one, sends all that it knows then, and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from inferpool.engine.catalog_parcel import pack, unpack
from inferpool.engine.control import ControlSocket
from inferpool.engine.spawn import begin_child
from inferpool.errors import InferpoolError, Reason
from inferpool.observe.logs import configure_logs
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Result, VersionKey
from inferpool.repository.config import ModelConfig
from inferpool.repository.lifecycle import Phase
from inferpool.repository.load.loader import Loader
from inferpool.repository.load.measuring_process import MeasureRequest
from inferpool.settings import Settings
from inferpool.system.memory import limit_data

log = logging.getLogger(__name__)

NAME: Final = "inferpool-load"
_MOST_REASON: Final = 10_000
"""Characters of a reason; a message has room for them."""


class _NoResults:
    """The outbox of a process that answers no requests."""

    def put(self, results: Sequence[Result]) -> None:
        """Ignore the results."""

    def ended(self, entry_ids: Sequence[int]) -> None:
        """Ignore the entries."""


def main() -> int:
    """Measure what the first message asks for, and send the result."""
    control = begin_child(NAME)
    with contextlib.suppress(EOFError):  # nobody waits for the plan any more
        _measure(control)
    logging.shutdown()
    # The usual exit waits for threads of runtimes.
    os._exit(0)


def _measure(control: ControlSocket) -> None:
    message = control.wait()
    (descriptor,) = message.descriptors
    content = unpack(descriptor).catalog
    message.close()
    request = MeasureRequest(**content["request"])
    # An engine bounds its own memory, and a child inherits the bound.
    limit_data(None)
    settings = Settings.model_validate(request.settings)
    configure_logs(
        settings.log_level, settings.log_format, process=f"load of {request.model}/{request.version}"
    )
    reason, plans = _try(control, request, settings, content["plans"])
    if reason is not None:
        control.send("failed", {"reason": reason[:_MOST_REASON]})
        return
    parcel = pack({"plans": plans}, {})
    control.send("measured", {}, [parcel])
    os.close(parcel)


def _try(
    control: ControlSocket, request: MeasureRequest, settings: Settings, plans: dict[str, str]
) -> tuple[Reason | None, dict[str, Any]]:
    """Measure the version; returns why that has failed, or None and the plans."""
    loader = Loader(
        settings,
        _NoResults(),
        Metrics({}),
        time.monotonic,
        plans=plans,
        device=request.device,
    )

    def enter(phase: Phase) -> None:
        control.send("phase", {"phase": phase})
        control.wait()

    try:
        loader.measure(
            VersionKey(request.model, request.version),
            Path(request.file),
            None if request.folder is None else Path(request.folder),
            ModelConfig.model_validate(request.config),
            enter,
            remeasure=request.remeasure,
        )
    except InferpoolError as error:
        return error.detail, {}
    except EOFError:
        raise
    except BaseException as error:
        # A model's code or a native library may raise SystemExit.
        log.exception("loading %s/%d", request.model, request.version)
        return f"loading failed with {type(error).__name__}: {error}", {}
    return None, dict(loader.plans())
