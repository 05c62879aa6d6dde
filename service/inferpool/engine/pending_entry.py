"""An entry that the engine of a web process has, or waits for, and whose block is therefore in use."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from inferpool.engine.tensor_layouts import Layout
from inferpool.errors import InferpoolError
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry

log = logging.getLogger(__name__)


class PendingEntry:
    """An entry whose block is in use.

    Attributes:
        entry: the entry, without its inputs.
        layout: the layout of its inputs; None if it has parts.
        parts: the layouts of its parts.
        starts: where in the block the inputs of each part begin.
        offset: where the block is in the arena.
        nbytes: how many bytes the block has.
        outputs_at: where in the block outputs begin.
        body: the memory that the body was received into, if the block is a part of it; None if the block was
            allocated for the entry.
        more_at: where the memory is that was given for outputs too large for the block.
        more_bytes: how many bytes that memory has; 0 if there is none.
        sent: whether the engine has the entry.
        accepted: whether an engine that ended had the entry.
        crashes: in how many engines the entry ran when they ended.
        wanted: whether the result is still to be delivered.
        refusal: why the engine does not run the version, if it has refused the entry.
        refused_until: when a refusal becomes the result, unless another engine has the version by then.
        runs_on: whether the engine has answered, and still reads the block.
    """

    __slots__ = (
        "accepted", "body", "crashes", "entry", "layout", "more_at", "more_bytes", "nbytes", "offset",
        "outputs_at", "parts", "refusal", "refused_until", "runs_on", "sent", "starts", "wanted",
    )  # fmt: skip

    def __init__(
        self, entry: Entry, layout: Layout | None, offset: int, nbytes: int, outputs_at: int
    ) -> None:
        self.entry = entry
        self.layout = layout
        self.parts: Sequence[Layout] = ()
        self.starts: Sequence[int] = ()
        self.offset = offset
        self.nbytes = nbytes
        self.outputs_at = outputs_at
        self.body: object = None
        self.more_at = 0
        self.more_bytes = 0
        self.sent = False
        self.accepted = False
        self.crashes = 0
        self.wanted = True
        self.refusal: InferpoolError | None = None
        self.refused_until = 0.0
        self.runs_on = False

    def count(self, metrics: Metrics | None, name: str) -> None:
        """Add 1 to a counter of the entry's version."""
        if metrics is not None:
            key = self.entry.key
            metrics.value(name, key.model, str(key.version)).add(1.0)

    def log_crash(self) -> None:
        """Log that engines have ended on the entry: its version and the shapes of its inputs, no content."""
        entry = self.entry
        layouts = self.parts if self.layout is None else [self.layout]
        shapes = "; ".join(
            f"{form.name:.100} {form.code} {['rows', *form.shape] if form.by_rows else list(form.shape)}"
            for layout in layouts[:4]
            for form in layout.forms[:8]
        )
        log.error(
            "%s/%d crashed its engine on request %s twice: %d rows of %s",
            entry.key.model, entry.key.version, entry.request_id, entry.rows, shapes,
        )  # fmt: skip
