"""`inferpool check` in the process of a test."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from inferpool import cli
from inferpool.observe import logs

from tests.server import CHAOS

Check = Callable[..., str]


@pytest.fixture
def check(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Check:
    """Run `inferpool check` and return its output and its log; `status` is the exit status that is expected.

    It runs in this process: the imports of one of its own take a second of CPU time.
    """
    monkeypatch.syspath_prepend(CHAOS)
    # Lines go to the handler of this test.
    monkeypatch.setattr(logs, "configure_logs", lambda level, _: caplog.set_level(level.upper()))

    def run(path: Path, *flags: str, status: int = 0) -> str:
        caplog.clear()
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ended = cli.main(
                ["check", str(path), "--measure-ms", "50", "--cache-dir", str(cache_dir), *flags]
            )
        assert ended == status, output.getvalue()
        return output.getvalue() + "".join(f"{message}\n" for message in caplog.messages)

    return run
