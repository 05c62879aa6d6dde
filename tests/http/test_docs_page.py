"""The page of the API: the page and all its files come from the server."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

from tests.server import Server

KINDS = {"script": "text/javascript", "stylesheet": "text/css", "shortcut icon": "image/png"}


class Named(HTMLParser):
    """The addresses that a page loads, by their kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get("src") or given.get("href")
        if address is not None:
            self.addresses[given.get("rel") or tag] = address


def test_every_file_of_the_page_comes_from_the_server(bundled: Server) -> None:
    page = bundled.get("/docs")
    assert page.status_code == 200
    assert "//" not in page.text, "the page names no other host"
    named = Named(page.text).addresses
    assert named.keys() == KINDS.keys()
    for kind, address in named.items():
        file = bundled.get(urlsplit(urljoin(str(page.url), address)).path)
        assert (file.status_code, file.headers["content-type"].split(";")[0]) == (200, KINDS[kind]), address
        assert len(file.content) == int(file.headers["content-length"]) > 1000
    [document] = re.findall(r"url: '(.*)'", page.text)
    assert bundled.get("/" + document).json()["info"]["title"] == "Inferpool"


def test_the_style_sheet_loads_no_other_file(bundled: Server) -> None:
    style = bundled.get("/docs/files/swagger-ui.css").text
    assert "@import" not in style
    assert set(re.findall(r"url\([\"']?(\w+:?)", style)) == {"data:"}


@pytest.mark.parametrize("path", ["nothing.js", "../core.py", "%2e%2e/core.py", ""])
def test_other_files_are_not_found(bundled: Server, path: str) -> None:
    answer = bundled.get(f"/docs/files/{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_without_other_hosts_shows_the_routes(bundled: Server, tmp_path: Path) -> None:
    command = [
        # The sandbox does not work for root or in most containers; the page is our own.
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
        # The virtual clock waits until the files are loaded and the page has used them.
        *("--virtual-time-budget=10000", "--dump-dom", f"{bundled.url}/docs"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    shown = set(re.findall(r'data-path="([^"]*)"', run.stdout))
    assert {"/predict/{model}", "/models", "/v2/models/{model}/infer"} <= shown, run.stderr
