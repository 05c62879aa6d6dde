"""Runs a model in this process for one program: the whole server, which nobody else can reach.

So files are answered by the code that answers requests: the same formats, batches and errors.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from inferpool.client import Client
from inferpool.errors import LoadError
from inferpool.http.predict.version_observer import Taker
from inferpool.observe.logs import configure_logs
from inferpool.settings import Settings
from inferpool.system.listeners import listen_unix
from inferpool.system.memory import keep_freed_memory

_LOOK_S: Final = 0.05
"""Pause between two looks at a model that loads."""

_RETRIES: Final = 20
_END_S: Final = 1.0
"""How long the thread that predicts may take to end once the server has ended."""
INTERRUPTED: Final = 130
"""The exit status of a run that a signal has ended, as shells have it for Ctrl+C."""

_T = TypeVar("_T")


def run_with_model(
    path: Path, settings: Settings, use: Callable[[Client, str], _T], taker: Taker | None = None
) -> _T:
    """Load the model in `path`, call `use` with a client and the model's name, and return its result.

    `use` runs in a thread of its own, because the server takes the signals in the main thread. `taker`
    takes every request that the server has answered. Raises what
    `use` raises, and LoadError if the model cannot be served.
    """
    from inferpool import app

    results: list[_T] = []
    faults: list[BaseException] = []
    keep_freed_memory()
    log_lines = configure_logs(settings.log_level, "console")
    with tempfile.TemporaryDirectory(prefix="inferpool-") as folder:
        socket_path = Path(folder) / "socket"

        def work() -> None:
            try:
                with Client(f"unix:{socket_path}", timeout_s=None, retries=_RETRIES) as client:
                    results.append(use(client, _wait_ready(client)))
            # The main thread raises whatever it is.
            except BaseException as error:  # noqa: BLE001
                faults.append(error)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=work, name="predict", daemon=True)
        with listen_unix(socket_path, 0o600) as listener:
            thread.start()
            app.serve(listener, str(path), settings, log_lines, taker)
            thread.join(_END_S)
    if thread.is_alive():
        # A signal has ended the server. Python would wait for the threads that wait for its answers.
        logging.shutdown()
        os._exit(INTERRUPTED)
    if faults:
        raise faults[0]
    return results[0]


def _wait_ready(client: Client) -> str:
    """Wait until the only model answers; returns its name. Raises LoadError if it cannot be served."""
    while True:
        models = client.models()
        states = [version["state"] for model in models for version in model["versions"]]
        if models and "loading" not in states:
            break
        time.sleep(_LOOK_S)
    if len(models) > 1:
        names = ", ".join(model["name"] for model in models)
        raise LoadError(f"there are several models: {names}; name the folder of one of them")
    if not client.ready(models[0]["name"]):
        reasons = [version["reason"] for version in models[0]["versions"] if version["reason"]]
        raise LoadError(f"{models[0]['name']} cannot be served: {' '.join(reasons)}")
    return str(models[0]["name"])
