"""Calls of gRPC with the messages of the server, which share no names with those of published clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from inferpool.grpc_api.messages import SERVICE, message

from tests.server import Server

CALL_S = 60


class Caller:
    """A client of one server. Calls wait until the server can be reached."""

    def __init__(self, server: Server, key: str | None = None, credentials: Any = None) -> None:
        self.port = int(server.wait_for(r"gRPC listens on \S+:(\d+)").group(1))
        address = f"localhost:{self.port}"
        options = [
            *((f"grpc.max_{kind}_message_length", -1) for kind in ("send", "receive")),
            *((f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")),
        ]
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)

    def method(self, name: str) -> Any:
        """A method of the service, to be called with a message."""
        kind = message(f"{name}Response")
        return self.channel.unary_unary(
            f"/{SERVICE}/{name}", lambda request: request.SerializeToString(), kind.FromString
        )

    def call(self, method: str, /, timeout: float = CALL_S, **fields: Any) -> Any:
        """The response of a call."""
        request = message(f"{method}Request")(**fields)
        return self.method(method)(request, timeout=timeout, wait_for_ready=True, metadata=self._metadata)

    def begin(self, request: Any, timeout: float = CALL_S) -> Any:
        """Begin to infer, without waiting."""
        return self.method("ModelInfer").future(
            request, timeout=timeout, wait_for_ready=True, metadata=self._metadata
        )

    def stream(self, requests: Iterator[Any], timeout: float = CALL_S) -> Any:
        """Begin a `ModelStreamInfer`: an iterator over its responses."""
        method = self.channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            lambda request: request.SerializeToString(),
            message("ModelStreamInferResponse").FromString,
        )
        return method(requests, timeout=timeout, wait_for_ready=True, metadata=self._metadata)

    def infer(self, request: Any, timeout: float = CALL_S) -> Any:
        """The response of a `ModelInfer`."""
        return self.begin(request, timeout).result()

    def refused(self, request: Any, timeout: float = CALL_S) -> Any:
        """The error that a `ModelInfer` ends with."""
        call = self.begin(request, timeout)
        error = call.exception()
        assert error is not None
        return error

    def close(self) -> None:
        self.channel.close()


def raw_request(
    model: str, name: str, datatype: str, shape: tuple[int, ...], data: bytes, **fields: Any
) -> Any:
    """A request with one input in raw form."""
    request = message("ModelInferRequest")(model_name=model, raw_input_contents=[data], **fields)
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    return request


def rows_request(model: str, *rows: float) -> Any:
    """A request for the model of `tests.chaos`: each row begins with one of the numbers."""
    tensor = np.zeros((len(rows), 4), np.float32)
    tensor[:, 0] = rows
    return raw_request(model, "x", "FP32", tensor.shape, tensor.tobytes())


def metadata_of(call: Any) -> dict[str, str]:
    """The metadata behind a response or an error."""
    return dict(call.trailing_metadata())


def process_of(server: Server) -> int | None:
    """The id of the server's process that serves gRPC, None while there is none."""
    for pid in server.processes():
        try:
            if Path(f"/proc/{pid}/comm").read_text() == "inferpool-grpc\n":
                return pid
        except OSError:
            continue
    return None
