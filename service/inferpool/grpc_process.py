"""The main of the process that serves gRPC. It passes requests on to web processes, and runs no model."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any, Final

import grpc
import uvloop

from inferpool.engine.control import ControlSocket, Message
from inferpool.engine.spawn import begin_child
from inferpool.errors import ConfigError
from inferpool.grpc_api.client_line import ClientLines
from inferpool.grpc_api.health import Health
from inferpool.grpc_api.message_budget import MessageBudget
from inferpool.grpc_api.messages import HEALTH_SERVICE, REFLECTION_SERVICE, SERVICE
from inferpool.grpc_api.reflection import Reflection
from inferpool.grpc_api.rest_client import RestClient
from inferpool.grpc_api.service import Service
from inferpool.grpc_api.tls_credentials import TlsCredentials
from inferpool.http.access.make_gate import has_keys
from inferpool.http.access.tls import TlsFiles
from inferpool.observe.families import CPU_SECONDS
from inferpool.observe.logs import configure_logs
from inferpool.observe.regions import Region
from inferpool.settings import Settings

log = logging.getLogger(__name__)

MOST_CALLS: Final = 2048
"""Calls at once. gRPC itself refuses more, with the status RESOURCE_EXHAUSTED."""
MOST_MESSAGE_BYTES: Final = 2**31 - 1
"""gRPC and protobuf can send no larger message."""
BEAT_S: Final = 1.0
_PING_MS: Final = 60_000
"""A connection on which nothing comes for so long is asked whether its client is still there."""
_PONG_MS: Final = 20_000
_LEAST_PING_MS: Final = 5_000
"""Clients may ask so often whether the server is still there, also between calls."""


class GrpcProcess:
    """Serves until the parent says that the server drains."""

    def __init__(self, control: ControlSocket, start: Message) -> None:
        facts = start.values
        self._control = control
        self._settings = Settings.model_validate(facts["settings"])
        self._port: int = facts["port"]
        self._address: str = facts["address"]
        self._drain: asyncio.Future[dict[str, Any]] | None = None
        self._region = Region(start.descriptors[0], facts["slot"]) if start.descriptors else None

    async def serve(self) -> None:
        """Serve. Raises ConfigError if the port or the TLS files cannot be used."""
        loop = asyncio.get_running_loop()
        self._drain = loop.create_future()
        settings = self._settings
        web = RestClient(self._address)
        most = min(settings.max_body_bytes, MOST_MESSAGE_BYTES)
        budget = MessageBudget(settings.in_flight_bytes, most)
        public = "predict" in settings.public_scopes or bool(settings.tls_client_scopes)
        service = Service(
            web,
            budget,
            ClientLines(with_certificates=bool(settings.tls_client_scopes)),
            needs_key=has_keys(settings) and not public,
            has_tenants=has_keys(settings),
        )
        health = Health(service, budget)
        server = grpc.aio.server(
            maximum_concurrent_rpcs=MOST_CALLS,
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would take each other's requests.
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", _PING_MS),
                ("grpc.keepalive_timeout_ms", _PONG_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", _LEAST_PING_MS),
            ],
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, service.handlers()),
                grpc.method_handlers_generic_handler(HEALTH_SERVICE, health.handlers()),
                grpc.method_handlers_generic_handler(REFLECTION_SERVICE, Reflection(budget).handlers()),
            )
        )
        port = self._listen(server)
        await server.start()
        loop.add_reader(self._control.fileno(), self._hear)
        self._control.send("listening", {"port": port})
        beats = loop.create_task(self._beat())
        drain = await self._drain
        await asyncio.sleep(drain["settle_s"])
        health.end()
        service.end_streams()
        await server.stop(drain["timeout_s"])
        beats.cancel()
        web.close()

    def _listen(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{self._port}"
        try:
            if settings.tls_certificate_file is None:
                return int(server.add_insecure_port(address))
            files = TlsFiles(
                settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file
            )
            return int(server.add_secure_port(address, TlsCredentials(files).credentials()))
        except RuntimeError as error:
            raise ConfigError(
                f"gRPC cannot listen on {address}; --host and --grpc-port choose another address"
            ) from error

    def _hear(self) -> None:
        try:
            while (message := self._control.receive()) is not None:
                assert self._drain is not None
                if message.kind == "drain" and not self._drain.done():
                    self._drain.set_result(message.values)
        except EOFError:  # the parent has ended
            os._exit(1)

    async def _beat(self) -> None:
        """Show that the process lives, and what it has used of the CPU."""
        region = self._region
        if region is None:
            return
        while True:
            numbers = region.numbers(CPU_SECONDS, (), 1)
            if numbers is not None:
                numbers[0] = time.process_time()
            region.beat(time.monotonic())
            await asyncio.sleep(BEAT_S)


def main() -> int:
    """Run the process that `inferpool.engine.grpc_keeper` has started."""
    control = begin_child("inferpool-grpc")
    start = control.wait()
    settings = start.values["settings"]
    configure_logs(settings["log_level"], settings["log_format"], process="grpc")
    try:
        uvloop.run(GrpcProcess(control, start).serve())
    except ConfigError as error:
        control.send("refused", {"reason": error.detail})
        return 1
    return 0
