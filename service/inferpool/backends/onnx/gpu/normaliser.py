"""Normalises pixels on a GPU, into the memory that an input of a model is bound to.

A session of its own looks every pixel up in a table. The session runs in the stream of the model's session.
The next run there, captured or plain, therefore finds the input as if it had been copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferpool.backends.base import LoadOptions
from inferpool.backends.cuda.memory import Memory
from inferpool.backends.cuda.staging import Buffer, stage
from inferpool.backends.onnx.gpu.lookup_graph import PIXELS, ROWS, lookup_graph, pixel_shape, row_shape
from inferpool.backends.onnx.gpu.session import open_session, run_options
from inferpool.pixel_table import Normalisation
from inferpool.tensors import Array

_NAME: Final = Path("/normalise.onnx")
"""The name of the graph, which is in no file, in error texts."""

_KEPT_BINDINGS: Final = 256
"""Pairs of a number of rows and an address whose bindings are kept."""


class Normaliser:
    """A session that runs `lookup_graph` from its own memory to a given address.

    Attributes:
        normalisation: the table and the shapes.
    """

    def __init__(
        self, session: Any, normalisation: Normalisation, device: str, memory: Memory, *, streamed: bool
    ) -> None:
        """`streamed` says whether the session runs in the stream of `memory`."""
        self.normalisation = normalisation
        self._session = session
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))
        self._memory = memory
        self._streamed = streamed
        self._options = run_options(streamed)
        self._buffer = Buffer()
        self._bindings: dict[tuple[int, int], tuple[Any, Array, int]] = {}
        self._pixel_shape, self._row_shape = pixel_shape(normalisation), row_shape(normalisation)
        self._row_bytes = normalisation.values.itemsize * prod(self._row_shape)

    def run(self, pixels: Sequence[Array], rows: int, address: int) -> int:
        """Queue a run that writes `rows` rows to `address`: all `pixels`, normalised, then zeros.

        Returns the number of pictures. Raises what ONNX Runtime raises, and OutOfMemory.
        """
        key = rows, address
        binding, staged, source = self._bindings.get(key) or self._bind(rows, address)
        used = sum(map(len, pixels))
        stage(staged[:used], pixels)
        # The run also normalises the old bytes after the pictures. They are cleared below.
        self._memory.upload(source, staged[:used])
        if not self._streamed:
            self._memory.wait()
        self._session.run_with_iobinding(binding, self._options)
        if used < rows:
            self._memory.clear(address + used * self._row_bytes, (rows - used) * self._row_bytes)
        return used

    def close(self) -> None:
        """Drop the session. The owner of `memory` frees the memory."""
        self._bindings.clear()
        self._session = None

    def _bind(self, rows: int, address: int) -> tuple[Any, Array, int]:
        self._buffer.grow(self._memory, rows * prod(self._pixel_shape))
        if len(self._bindings) >= _KEPT_BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        binding = self._session.io_binding()
        dtype = np.dtype(np.uint8)
        binding.bind_input(
            PIXELS, *self._device, dtype.type, (rows, *self._pixel_shape), self._buffer.address
        )
        values = self.normalisation.values.dtype.type
        binding.bind_output(ROWS, *self._device, values, (rows, *self._row_shape), address)
        staged = self._buffer.view(dtype, (rows, *self._pixel_shape))
        self._bindings[rows, address] = bound = binding, staged, self._buffer.address
        return bound


def open_normaliser(
    normalisation: Normalisation, options: LoadOptions, settings: Any, memory: Memory
) -> Normaliser:
    """A normaliser on `options.device` in the stream of `memory`; `settings` are new session options.

    Raises LoadError if a node would run on the CPU, and OutOfMemory if the device has no memory left.
    """
    plain = options.with_gpu(graphs=False, tensorrt=None, cpu_nodes="none")
    graph = lookup_graph(normalisation)
    session, _ = open_session(_NAME, plain, settings, memory.stream, graph)
    return Normaliser(session, normalisation, options.device, memory, streamed=True)
