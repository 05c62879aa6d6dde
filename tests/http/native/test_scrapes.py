"""However many clients scrape, few pages are made; each shows what was counted before it was asked for."""

from __future__ import annotations

import asyncio
import threading

from inferpool.http.native.scrapes import Scrapes
from inferpool.observe.metrics import Metrics
from inferpool.observe.metrics_page import MetricsPage


class CountedPage(MetricsPage):
    """A page whose text is the count when it was made; the first one waits until `go` is set."""

    def __init__(self) -> None:
        super().__init__(Metrics({}))
        self.count = self.made = 0
        self.begun, self.go = threading.Event(), threading.Event()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        self.made += 1
        counted = self.count
        self.begun.set()
        self.go.wait()
        return str(counted).encode().ljust(10_000), "text/plain"


def test_scrapes_that_come_while_a_page_waits_share_it() -> None:
    async def scrape() -> None:
        page = CountedPage()
        scrapes = Scrapes(page)
        first = asyncio.create_task(scrapes.make("", False))
        await asyncio.to_thread(page.begun.wait)
        page.count = 7
        others = [asyncio.create_task(scrapes.make("", False)) for _ in range(50)]
        await asyncio.sleep(0)
        # Those that go away take the page from nobody.
        for task in others[:49]:
            task.cancel()
        await asyncio.gather(*others[:49], return_exceptions=True)
        others.append(asyncio.create_task(scrapes.make("", False)))
        await asyncio.sleep(0)
        page.go.set()
        assert (await first)[0].strip() == b"0"
        assert [(await task)[0].strip() for task in others[49:]] == [b"7", b"7"]
        assert page.made == 2
        page.count = 8
        assert (await scrapes.make("", False))[0].strip() == b"8", "no page is kept"

    asyncio.run(scrape())


def test_each_form_has_pages_of_its_own() -> None:
    async def scrape() -> None:
        page = CountedPage()
        page.go.set()
        scrapes = Scrapes(page)
        asked = [("", False), ("application/openmetrics-text", False), ("", True)]
        answers = await asyncio.gather(*(scrapes.make(*form) for form in asked))
        assert [headers.get("content-encoding") for _, headers in answers] == [None, None, "gzip"]
        assert page.made == 3

    asyncio.run(scrape())
