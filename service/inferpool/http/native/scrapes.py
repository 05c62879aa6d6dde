"""Makes the page of metrics for all scrapes, in a thread of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from inferpool.http.predict.compression import gzipped
from inferpool.observe.exposition import Exposition, choose_exposition
from inferpool.observe.metrics_page import MetricsPage
from inferpool.system.cpu_pace import yield_to_others

Page = tuple[bytes, dict[str, str]]
"""The body of a response, and its headers."""


class Scrapes:
    """The page that is being made, and those that wait for that.

    With many versions a page takes a while, and predictions must go on: one thread of lower priority makes
    one page after another. Scrapes that come while a page of their form waits share it, so at most one of
    each form waits, however many clients ask.
    """

    def __init__(self, page: MetricsPage) -> None:
        """Make no page yet; the thread starts with the first one."""
        self._page = page
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics", initializer=yield_to_others)
        self._last: dict[tuple[Exposition, bool], Future[Page]] = {}

    async def make(self, accept: str, packs: bool) -> Page:
        """A page that shows all that was counted before this call; `packs` tells whether gzip is accepted."""
        form = (choose_exposition(accept), packs)
        page = self._last.get(form)
        if page is None or page.running() or page.done():
            page = self._last[form] = self._thread.submit(self._render, accept, packs)
        try:
            # A client that goes away must not take the page from the others.
            return await asyncio.shield(asyncio.wrap_future(page))
        finally:
            if page.done() and self._last.get(form) is page:
                del self._last[form]

    def _render(self, accept: str, packs: bool) -> Page:
        body, content_type = self._page.render(accept)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        packed = gzipped([body]) if packs else None
        return (body, headers) if packed is None else (packed, {**headers, "content-encoding": "gzip"})
