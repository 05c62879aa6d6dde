"""The routes of samples: an administrator lists, exports and deletes what is kept of requests."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import orjson
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from inferpool.errors import InternalError, InvalidInput, NotFound
from inferpool.http.access.audit import audited
from inferpool.http.body_model import BodyModel
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.native.api import NATIVE_API
from inferpool.http.openapi_parts import error_responses
from inferpool.http.predict.observations import Observations
from inferpool.http.route_table import RouteTable
from inferpool.privacy.store import Choice, Listed, SampleStore
from inferpool.tensors import Array

MOST_LISTED: Final = 1000
MOST_BYTES: Final = 256 * 1024
"""Bytes of samples in one answer, which ends after the sample that reaches them."""

T = TypeVar("T")


class SampleQuery(BodyModel):
    """Which samples are meant: those for which everything that is given holds."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, max_length=128, description="The id of a request.")
    tenant: str | None = Field(None, max_length=1000, description="To whom the key of a request belongs.")
    model: str | None = Field(None, max_length=1000, description="The name of a model.")
    version: int | None = Field(None, ge=1, le=2**31 - 1, description="The number of a version.")
    older_than_s: float | None = Field(
        None, ge=0, le=1e10, allow_inf_nan=False, description="The least age in seconds."
    )

    def choice(self) -> Choice:
        """The same for the store."""
        before = None if self.older_than_s is None else time.time() - self.older_than_s
        return Choice(self.id, self.tenant, self.model, self.version, before)


class ListQuery(SampleQuery):
    """Which samples are meant, and from where on."""

    after: int = Field(0, ge=0, le=2**62, description="Where the last answer has ended, its `next`.")
    limit: int = Field(100, ge=1, le=MOST_LISTED, description="Samples of an answer at most.")
    rows: bool = Field(False, description="Whether to send what was kept, and not only about it.")


class FieldOut(BodyModel):
    """A field that was kept, one value or list a row."""

    name: str
    values: list[Any]


class KeptSampleOut(BodyModel):
    """A sample. `id`, `tenant` and fields are null if the key that encrypted it is gone.

    `created` is in seconds since 1970. `inputs` and `outputs` are null unless `rows` is asked for.
    """

    number: int
    id: str | None
    tenant: str | None
    model: str
    version: int
    created: float
    rows: int
    bytes: int
    key: str
    inputs: list[FieldOut] | None
    outputs: list[FieldOut] | None


class KeptSamplesOut(BodyModel):
    """Some samples, oldest first; `next` is where the next answer begins, null at the end."""

    samples: list[KeptSampleOut]
    held: int
    bytes: int
    next: int | None


class DeletedOut(BodyModel):
    """How many samples were deleted."""

    deleted: int


def add_samples(app: RouteTable, observations: Observations) -> None:
    """Give `app` the routes of samples."""

    @app.get(
        "/samples",
        tags=["admin"],
        summary="Samples of requests",
        query=ListQuery,
        response_model=KeptSamplesOut,
        responses=_errors("403", "404", "422"),
    )
    async def list_samples(request: Request, query: ListQuery) -> Response:
        """With `rows`, what was kept of them; each such answer leaves a line in the log."""
        store = _store(observations)

        def read() -> tuple[int, bytes]:
            found = store.read(query.choice(), query.after, query.limit, MOST_BYTES)
            totals = store.totals()
            # As JSON here, in the thread: a million numbers would hold up the event loop.
            return len(found), orjson.dumps(
                {
                    "samples": [_sample_out(each, with_rows=query.rows) for each in found],
                    "held": totals.held,
                    "bytes": totals.nbytes,
                    "next": found[-1].number if found else None,
                }
            )

        work = asyncio.to_thread(_guarded, read)
        if query.rows:
            _, body = await audited(
                request, f"read samples{_described(query)}", work, lambda found: f"{found[0]} samples"
            )
        else:
            _, body = await work
        return Response(body, headers={"cache-control": "no-store"}, media_type=JSON_TYPE)

    @app.delete(
        "/samples",
        tags=["admin"],
        summary="Delete samples",
        query=SampleQuery,
        responses=_errors("403", "404", "422"),
    )
    async def delete_samples(request: Request, query: SampleQuery) -> DeletedOut:
        """All samples for which everything that is given holds; `older_than_s=0` means all."""
        store, choice = _store(observations), query.choice()
        if choice == Choice():
            raise InvalidInput("name what to delete: id, tenant, model, version or older_than_s", field="id")

        def delete() -> DeletedOut:
            return DeletedOut(deleted=store.delete(choice))

        work = asyncio.to_thread(_guarded, delete)
        act = f"delete samples{_described(query)}"
        return await audited(request, act, work, lambda found: f"{found.deleted} samples")


def _store(observations: Observations) -> SampleStore:
    if observations.store is None:
        raise NotFound("this server keeps no samples; see --samples-dir")
    return observations.store


def _guarded(work: Callable[[], T]) -> T:
    """Do work on the store, in a thread; raises InternalError if the disk fails."""
    try:
        return work()
    except (sqlite3.Error, OSError) as error:
        raise InternalError("the store of samples has failed; the log says why") from error


def _described(query: SampleQuery) -> str:
    """What a line of the log says of a query: neither ids nor tenants of those who sent requests."""
    given = query.model_dump(exclude_none=True, include={"model", "version", "older_than_s"})
    parts = [f" {name}={value!r:.100}" for name, value in given.items()]
    parts += [f" by {name}" for name in ("id", "tenant") if getattr(query, name) is not None]
    return "".join(parts)


def _sample_out(listed: Listed, *, with_rows: bool) -> dict[str, Any]:
    """A `KeptSampleOut` for orjson."""
    sample = listed.sample
    shown = sample if with_rows else None
    return {
        "number": listed.number,
        "id": None if sample is None else sample.request_id,
        "tenant": None if sample is None else sample.tenant,
        "model": listed.model,
        "version": listed.version,
        "created": listed.created,
        "rows": listed.rows,
        "bytes": listed.nbytes,
        "key": listed.key,
        "inputs": None if shown is None else _fields_out(shown.inputs),
        "outputs": None if shown is None else _fields_out(shown.outputs),
    }


def _fields_out(fields: Mapping[str, Array]) -> list[dict[str, Any]]:
    # JSON has no infinities: orjson writes null for them.
    return [{"name": name, "values": array.tolist()} for name, array in fields.items()]


def _errors(*statuses: str) -> dict[int | str, dict[str, Any]]:
    documented = error_responses("Problem", NATIVE_API.problem_type.decode())
    return {int(status): documented[status] for status in statuses}
