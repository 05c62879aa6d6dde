"""Pixels on a GPU, normalised there into the memory that an input of a model is bound to.

A session of its own, with a graph that looks every pixel up, runs in the stream of the model's: what follows
it there, a graph that was captured over that memory or a plain run, finds the input as if it had been copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferpool.backends.base import LoadOptions
from inferpool.backends.cuda.memory import Memory
from inferpool.backends.cuda.staging import Buffer, stage
from inferpool.backends.onnx.gpu.lookup_graph import PIXELS, ROWS, given_shape, lookup_graph, taken_shape
from inferpool.backends.onnx.gpu.session import open_session, run_options
from inferpool.pixel_table import Normalisation
from inferpool.tensors import Array

_NAME: Final = Path("/normalise.onnx")
"""What the graph, which is in no file, is called where it cannot be loaded."""

_KEPT_BINDINGS: Final = 256
"""Numbers of rows, and places for them, whose bindings are kept."""


class Normaliser:
    """A session that runs `lookup_graph` from its own memory to wherever it is told.

    Attributes:
        normalisation: what it does.
    """

    def __init__(
        self, session: Any, normalisation: Normalisation, device: str, memory: Memory, *, streamed: bool
    ) -> None:
        """`streamed` says that the session runs in the stream of `memory`."""
        self.normalisation = normalisation
        self._session = session
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))
        self._memory = memory
        self._streamed = streamed
        self._options = run_options(streamed)
        self._room = Buffer()
        self._bindings: dict[tuple[int, int], tuple[Any, Array, int]] = {}
        self._taken, self._given = taken_shape(normalisation), given_shape(normalisation)
        self._row_bytes = normalisation.values.itemsize * prod(self._given)

    def run(self, pixels: Sequence[Array], rows: int, address: int) -> int:
        """Queue what puts `rows` rows at `address`: all `pixels`, normalised, and zeros after them.

        Returns how many pictures there are. Raises what ONNX Runtime raises, and OutOfMemory.
        """
        key = rows, address
        binding, staged, place = self._bindings.get(key) or self._bind(rows, address)
        used = sum(map(len, pixels))
        stage(staged[:used], pixels)
        # What is behind these is normalised as well, whatever it is, and cleared then.
        self._memory.upload(place, staged[:used])
        if not self._streamed:
            self._memory.wait()
        self._session.run_with_iobinding(binding, self._options)
        if used < rows:
            self._memory.clear(address + used * self._row_bytes, (rows - used) * self._row_bytes)
        return used

    def close(self) -> None:
        """Drop the session; its memory is given back by whose it is."""
        self._bindings.clear()
        self._session = None

    def _bind(self, rows: int, address: int) -> tuple[Any, Array, int]:
        self._room.grow(self._memory, rows * prod(self._taken))
        if len(self._bindings) >= _KEPT_BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        binding = self._session.io_binding()
        dtype = np.dtype(np.uint8)
        binding.bind_input(PIXELS, *self._device, dtype.type, (rows, *self._taken), self._room.address)
        values = self.normalisation.values.dtype.type
        binding.bind_output(ROWS, *self._device, values, (rows, *self._given), address)
        staged = self._room.view(dtype, (rows, *self._taken))
        self._bindings[rows, address] = bound = binding, staged, self._room.address
        return bound


def open_normaliser(
    normalisation: Normalisation, options: LoadOptions, settings: Any, memory: Memory
) -> Normaliser:
    """One on `options.device`, in the stream of `memory`; `settings` are those of its session.

    Raises LoadError where a node would not run there, or the device has no memory left (OutOfMemory).
    """
    plainly = replace(options, graphs=False, engine=None, cpu_nodes="none")
    graph = lookup_graph(normalisation)
    session, _ = open_session(_NAME, plainly, settings, memory.stream, graph)
    return Normaliser(session, normalisation, options.device, memory, streamed=True)
