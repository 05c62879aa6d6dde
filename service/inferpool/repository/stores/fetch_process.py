"""Starts the process that fetches models, and waits for it.

The server loads neither the libraries of the stores nor their threads and buffers; unpacking and hashing take
no time from requests; and if memory runs out, the kernel ends that process first.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferpool.errors import StoreError, StoreUnreachable
from inferpool.repository.stores.reference import StoreReference
from inferpool.settings import Settings
from inferpool.system.files import cache_folder

_MODULE: Final = "inferpool.repository.stores.fetch_main"
_LOOK_S: Final = 0.1


class Interrupted(Exception):
    """A signal has ended the server before it had its models."""


class FetchedModels(NamedTuple):
    """The folder of the models, and whether it has changed."""

    path: Path
    changed: bool


def store_cache(settings: Settings) -> Path:
    """The folder in which models are kept; raises StoreError for a user without a home."""
    try:
        return cache_folder(settings.cache_dir)
    except RuntimeError:
        raise StoreError(
            "there is no folder to keep fetched models in, because the user has no home; choose one with"
            " --cache-dir"
        ) from None


def fetch_models(
    reference: StoreReference,
    settings: Settings,
    *,
    not_since: float | None = None,
    signals: tuple[signal.Signals, ...] = (),
) -> FetchedModels:
    """Fetch the models of `reference`, and wait for them; see `inferpool.repository.stores.fetch`.

    `signals` are blocked by the caller; one of them ends the wait.

    Raises StoreError, or Interrupted.
    """
    asked = {
        "reference": reference.text,
        "cache": str(store_cache(settings).absolute()),
        "not_since": not_since,
        "log_level": settings.log_level,
        "log_format": settings.log_format,
    }
    with _start() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                process.stdin.flush()
            while signals and process.poll() is None:
                received = signal.sigtimedwait(signals, _LOOK_S)
                if received is not None and received.si_signo != signal.SIGHUP:
                    raise Interrupted
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    result = _result(answer, str(reference), process)
    return FetchedModels(Path(result["path"]), result["changed"])


class VersionFetch:
    """A process that fetches one version."""

    def __init__(self, wanted: Mapping[str, Any], settings: Settings) -> None:
        """`wanted` is a `WantedVersion` as JSON."""
        self._asked = {
            "version": wanted, "log_level": settings.log_level, "log_format": settings.log_format,
        }  # fmt: skip
        self._process = _start()

    def wait(self, tell: Callable[[int, int], None]) -> dict[str, Any]:
        """Wait for the end, and return the result; `tell` is called as by `fetch_version`.

        Raises StoreError.
        """
        process, line = self._process, b""
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(self._asked).encode() + b"\n")
                    process.stdin.flush()
                for line in process.stdout:
                    if line.startswith(b'{"fetched"'):
                        told = json.loads(line)
                        tell(told["fetched"], told["expected"])
            finally:
                process.kill()
        return _result(line, "the source", process)

    def cancel(self) -> None:
        """End the process; `wait` raises StoreError."""
        self._process.kill()


def _start() -> subprocess.Popen[bytes]:
    # A session of its own: a terminal's Ctrl-C is for the server, which then ends this process.
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _result(answer: bytes, shown: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The result that a process has printed; raises StoreError if it says so, or has none."""
    try:
        result: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise StoreUnreachable(f"{shown}: the fetch ended with status {process.returncode}") from None
    if "fetched" in result:
        raise StoreUnreachable(f"{shown}: the fetch ended with status {process.returncode}")
    if "error" in result:
        raise (StoreUnreachable if result["unreachable"] else StoreError)(result["error"])
    return result
