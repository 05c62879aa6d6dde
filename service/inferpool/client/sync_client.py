"""The client that blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from inferpool.client.answer import Prediction, Reply, join_predictions
from inferpool.client.backoff import Backoff
from inferpool.client.content import Content, cut, recognise
from inferpool.client.core import Attempt, Core, Failure, Options, Outcome, Pause, Steps
from inferpool.client.metadata import Metadata
from inferpool.client.slices import make_progress, slice_rows
from inferpool.client.transport import (
    DEFAULT_URL,
    is_small,
    make_address,
    make_headers,
    make_url,
    pieces,
    read_failure,
    timeouts,
)
from inferpool.tensors import Array

_T = TypeVar("_T")


class Client:
    """Asks a server for predictions; threads may share a client, which keeps its connections.

    Errors are those of `inferpool.errors`, by the `code` of the server's answer: `InvalidInput`, `QueueFull`,
    `ModelNotFound` and so on, each with `detail`, `status`, `request_id` and `members`. Without an answer
    they are `inferpool.client.ServerUnreachable` and `inferpool.errors.DeadlineExceeded`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        ca: str | Path | None = None,
        certificate: tuple[str | Path, str | Path] | None = None,
        timeout_s: float | None = 60.0,
        retries: int = 3,
        connections: int = 100,
    ) -> None:
        """Connect to `url` (`http://HOST:PORT`, `https://…` or `unix:PATH`) when the first request is sent.

        `key` is the key of the caller. `ca` is a file of the certificates to trust instead of the machine's,
        `certificate` are the files of the client's own and of its private key. `timeout_s` is the time for a
        call with all its repetitions, None for no end. A request that the server refuses for the moment (429,
        503), or whose connection fails, is repeated at most `retries` times, after the time that Retry-After
        says. `connections` is the most that are open at once.

        Raises ValueError for a wrong address or key, and OSError for a file that cannot be read.
        """
        address = make_address(url, ca, certificate, connections)
        self._base = address.base
        if "uds" in address.options:
            self._http = httpx.Client(transport=httpx.HTTPTransport(**address.options))
        else:
            self._http = httpx.Client(**address.options)
        self._core = Core(make_headers(key), Backoff(retries), timeout_s)

    def predict(
        self,
        model: str,
        inputs: Any,
        *,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        labels: bool = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """Run `model` on `inputs`.

        `inputs` are an array whose first dimension counts rows, a dict of arrays by the names of the inputs,
        a data frame, a picture or a list of pictures (`pathlib.Path`, bytes, or a picture of Pillow), or a
        sentence or a list of them. `version` is a number or a label, `outputs` names the outputs wanted.
        With `labels` the prediction has the names of the best classes, if the model has labels.
        `timeout_s` holds for this call; the server is told, and drops a request that comes too late.

        Raises TypeError if `inputs` are none of these, OSError for a path that cannot be read, and
        InferpoolError: see the class.
        """
        options = Options(version, outputs, labels, timeout_s, request_id)
        return self._run(self._core.predict(model, recognise(inputs), options))

    def predict_content(
        self,
        model: str,
        content: Content,
        version: str | int | None,
        outputs: Sequence[str] | None,
        labels: bool,
    ) -> Prediction:
        """Run `model` on inputs that have been recognised; otherwise like `predict`."""
        return self._run(self._core.predict(model, content, Options(version, outputs, labels)))

    def predict_many(
        self,
        model: str,
        inputs: Any,
        *,
        rows_per_request: int | None = None,
        concurrency: int = 4,
        progress: bool = False,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        labels: bool = False,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Run `model` on many rows in several requests, of which `concurrency` run at the same time.

        Returns one prediction with all rows in their order. `rows_per_request` is by default what comes to a
        megabyte of arrays, 1024 rows of a table, 64 sentences or 8 pictures. With `progress` a bar of tqdm
        shows how far it is. `timeout_s` holds for each request. The other parameters and errors are those of
        `predict`; after an error the remaining requests are not sent.
        """
        content = recognise(inputs)
        options = Options(version, outputs, labels, timeout_s)
        slices = slice_rows(content, rows_per_request, concurrency)

        def run(bounds: tuple[int, int]) -> Prediction:
            return self._run(self._core.predict(model, cut(content, *bounds), options))

        found = []
        with make_progress(progress, slices[-1][1]) as bar, ThreadPoolExecutor(concurrency) as threads:
            try:
                for (start, end), prediction in zip(slices, threads.map(run, slices), strict=True):
                    found.append(prediction)
                    bar.update(end - start)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return join_predictions(found)

    def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        input_type: str | None = None,
        version: str | int | None = None,
        timeout_s: float | None = None,
    ) -> Array:
        """Return a vector for each text, FP32, [texts, width], by the model's own pooling.

        `input_type` is "query" or "document" for models that tell them apart. Raises InferpoolError.
        """
        return self._run(self._core.embed(model, texts, input_type, Options(version, timeout_s=timeout_s)))

    def metadata(self, model: str, version: str | int | None = None) -> Metadata:
        """Return the inputs and outputs of a model; raises InferpoolError."""
        return self._run(self._core.metadata(model, version))

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the server as `GET /models` lists them; raises InferpoolError."""
        return self._run(self._core.models())

    def ready(self, model: str | None = None) -> bool:
        """Return whether the server, or a model, answers predictions now; False if there is no connection.

        Raises InferpoolError if the key does not suffice, or there is no such model.
        """
        return self._run(self._core.ready(model))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[_T]) -> _T:
        outcome: Outcome = None
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    outcome = None
                else:
                    outcome = self._attempt(step)
        except StopIteration as end:
            result: _T = end.value
            return result

    def _attempt(self, attempt: Attempt) -> Reply | Failure:
        parts = attempt.parts
        request = httpx.Request(
            attempt.method,
            make_url(self._base + attempt.path),
            headers=attempt.headers,
            content=b"".join(parts) if is_small(parts) else pieces(parts),
            extensions=timeouts(attempt.timeout_s),
        )
        try:
            response = self._http.send(request)
            return Reply(response.status_code, response.headers, response.content)
        except httpx.TransportError as error:
            return read_failure(error)
