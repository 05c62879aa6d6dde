"""The simplest batching, for the two floors: a thread that runs all requests that wait."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from shared import Model

Answer = Callable[[bytes], None]


class Batcher:
    """One thread and one model; answers return to the event loop once for each batch."""

    def __init__(self, model: Model, rows: int) -> None:
        self._model, self._rows = model, rows
        self._waiting: deque[tuple[bytes, Answer]] = deque()
        self._news = threading.Semaphore(0)
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, daemon=True).start()

    def offer(self, body: bytes, answer: Answer) -> None:
        """Call `answer` on the event loop with the body of the answer."""
        self._waiting.append((body, answer))
        if len(self._waiting) == 1:
            self._news.release()

    def _work(self) -> None:
        while True:
            self._news.acquire()
            while self._waiting:
                count = min(self._rows, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(count)]
                bodies = self._model.answers([body for body, _ in batch])
                self._loop.call_soon_threadsafe(self._hand_out, batch, bodies)

    @staticmethod
    def _hand_out(batch: list[tuple[bytes, Answer]], bodies: list[bytes]) -> None:
        for (_, answer), body in zip(batch, bodies, strict=True):
            answer(body)
