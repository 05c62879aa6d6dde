"""A real browser for tests, and what is asked of every page in it.

Without a browser, the module that imports this one is skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import pytest

if shutil.which("chromium") is None:
    pytest.skip("needs chromium: apt-get install chromium", allow_module_level=True)
pytest.importorskip("playwright", reason='needs playwright: pip install -e ".[test]"')

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

TIMEOUT_MS = 60_000
"""How long an expectation may take on a busy machine."""
VIOLATIONS = """axe.run().then(found =>
  found.violations.map(each => [each.id, each.nodes.map(node => node.html)]))"""
SCREENS: list[dict[str, Any]] = [
    {"color_scheme": "light"},
    {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}},
]
"""Options of `new_context`: a light screen, and a dark and narrow one."""

expect.set_options(timeout=TIMEOUT_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium without other hosts."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            # The sandbox does not work for root or in most containers; the pages are our own.
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


def new_page(context: BrowserContext, faults: list[str]) -> Page:
    """Open an empty page that adds to `faults` whatever goes wrong in it."""

    def note(kind: str, text: str) -> None:
        # Chromium writes a line for each answer with an error, which a page may expect and show.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            faults.append(text)

    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.on("console", lambda message: note(message.type, message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(f"a dialog: {dialog.message}"))
    return page


def check_page(page: Page, what: str) -> None:
    """Let axe look at the page, which must not be wider than the screen."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    assert page.evaluate(VIOLATIONS) == [], what
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), what
