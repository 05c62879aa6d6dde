"""The example page sends frames of a camera, which Chromium makes up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.docs.pages import ROOT

FRAMES = 3


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def origin() -> Iterator[str]:
    """The origin of a web server of the folder `docs`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(ROOT / "docs"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
def test_a_page_sends_one_frame_after_the_other(
    serve: Serve, models: Path, origin: str, tmp_path: Path
) -> None:
    """The page sends a frame once it has read the answer to the one before."""
    server = serve(models / "digits", "--cors-allow-origin", origin)
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
        # With this port, headless Chromium does not end once the page is loaded.
        *("--remote-debugging-port=0", f"--user-data-dir={tmp_path}"),
        f"{origin}/camera.html?server={server.url}&model=digits&start",
    ]
    browser = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        server.wait_for_metric("requests_total", at_least=FRAMES, model="digits", code="200")
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
