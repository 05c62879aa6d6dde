"""Starts a server: it takes the address, and decides which process does what.

Whatever answers requests is imported late: the parent of several processes needs none of it, and its children
start sooner.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from inferpool.backends.onnx.early_library import load_library_early
from inferpool.engine.supervisor import replace_process
from inferpool.errors import ConfigError, Reason
from inferpool.http.access.make_gate import check_exposure, make_gate
from inferpool.observe.logs import configure_logs, report_stopped
from inferpool.observe.metrics import Metrics
from inferpool.repository.stores.reference import StoreReference
from inferpool.repository.trust.digital_signature import check_signers
from inferpool.settings import Settings, with_memory
from inferpool.settings_sources import service_links
from inferpool.system.cpu import usable_cores
from inferpool.system.gpus import AUTO, CPU, cuda_driver
from inferpool.system.imports import kept_imports
from inferpool.system.install_hints import install_command
from inferpool.system.listeners import address_of, listen, listen_unix, remove_socket_file, socket_file
from inferpool.system.memory import keep_freed_memory

if TYPE_CHECKING:
    from inferpool.http.access.tls import Certificates

log = logging.getLogger(__name__)

_GRPC_PACKAGES = ("grpc", "grpc_health", "grpc_reflection")
CORES_PER_WEB_PROCESS = 4
"""Models on the CPU need most of the cores."""
CORES_PER_WEB_PROCESS_WITH_GPU = 2


def serve(repository: Path | StoreReference, settings: Settings, reason: Reason | None = None) -> int:
    """Serve the models in `repository` until a signal ends the server; returns the exit status.

    `reason` says why the models are looked for there, None if the user knows. The status is 0 if every
    accepted request was answered. The models of a store are fetched first; meanwhile the server is live, and
    not ready.

    Raises:
        ConfigError: `repository` has nothing to serve, the address cannot be bound, or the variables
            `OTEL_*` ask for spans that cannot be sent, or keys cannot be read.
        StoreError: there are no models in the store, or it does not answer.
    """
    keep_freed_memory()
    log_lines = configure_logs(settings.log_level, settings.log_format)
    links = service_links(os.environ)
    if links:
        log.warning(
            "%d variables that Kubernetes sets for Services are ignored, such as %s=%s; set"
            " enableServiceLinks: false in the pod to be rid of them",
            len(links),
            links[0],
            os.environ[links[0]][:100],
        )
    if reason is not None:
        log.info("the models are in %s: %s", repository, reason)
    check_exposure(settings)
    # The first step, so that an address in use is reported before anything about the models.
    certificates: Certificates | None = None
    if settings.tls_certificate_file is not None:
        from inferpool.http.access.tls import make_certificates

        certificates = make_certificates(settings)
    check_signers(settings.require_signatures)
    if settings.grpc_port is not None:
        _check_grpc(settings)
    if settings.unix_socket is None:
        listener = listen(settings.host, settings.port)
    else:
        listener = listen_unix(settings.unix_socket, int(settings.unix_socket_mode, 8))
    file = socket_file(listener)
    try:
        with listener:
            if isinstance(repository, StoreReference) and not _fetch(
                listener, repository, settings, certificates
            ):
                report_stopped(0)
                return 0
            name = repository.text if isinstance(repository, StoreReference) else str(repository)
            if settings.engine == "process":
                _supervise(listener, name, settings)
            load_library_early()
            with kept_imports():
                from inferpool import app

            status, is_busy = app.serve(listener, name, settings, log_lines)
            report_stopped(status)
    finally:
        remove_socket_file(file)
    if is_busy:
        # The usual exit destroys what a thread that loads or runs still uses; a native library then aborts.
        logging.shutdown()
        os._exit(status)
    return status


def _check_grpc(settings: Settings) -> None:
    """Raise ConfigError if the process that serves gRPC could not listen. It binds the port itself."""
    if any(find_spec(package) is None for package in _GRPC_PACKAGES):
        raise ConfigError(f"grpc_port needs packages that are missing: {install_command('grpc')}")
    if settings.grpc_port:
        listen(settings.host, settings.grpc_port, "--grpc-port").close()


def _fetch(
    listener: socket.socket,
    reference: StoreReference,
    settings: Settings,
    certificates: Certificates | None,
) -> bool:
    """Fetch the models; False if a signal ends the server before they are there. Raises StoreError."""
    from inferpool.engine.spawn import SUPERVISED
    from inferpool.http.not_ready_server import answer_not_ready
    from inferpool.repository.stores.fetch_process import Interrupted, fetch_models

    address = address_of(listener, tls=certificates is not None)
    log.info("listening on %s while the models of %s are fetched", address, reference)
    try:
        with answer_not_ready(listener, certificates, settings.root_path):
            fetch_models(reference, settings, signals=SUPERVISED)
    except Interrupted:
        log.info("a signal has ended the server before it had its models")
        return False
    return True


def _supervise(listener: socket.socket, repository: str, settings: Settings) -> NoReturn:
    """Serve from several processes: this one becomes their parent."""
    # So that wrong keys and tenants are reported here.
    gate, _ = make_gate(settings, time.monotonic, Metrics({}))
    if settings.tenants_file is not None:
        from inferpool.http.access.tenants_file import make_tenants

        make_tenants(settings.tenants_file, gate.enabled, Metrics({}))
    derive = not settings.in_flight_bytes
    webs = settings.web_processes or web_processes(usable_cores(), settings.devices)
    resolved = with_memory(settings).model_copy(update={"web_processes": webs})
    devices = settings.devices
    if tuple(devices) == (AUTO,):
        # CUDA's library is gone from the supervisor, which executes Python anew.
        devices = tuple(gpu.device for gpu in cuda_driver().gpus()) or (CPU,)
    more = {"derive": derive, "engine_devices": devices}
    replace_process(listener, repository, {**resolved.model_dump(mode="json"), **more})


def web_processes(cores: int, devices: Sequence[str], dev: Path = Path("/dev")) -> int:
    """How many web processes suit `cores`: one for four cores, for two if models run on GPUs."""
    gpus = tuple(devices) != (CPU,) and any(dev.glob("nvidia[0-9]*"))
    return max(1, cores // (CORES_PER_WEB_PROCESS_WITH_GPU if gpus else CORES_PER_WEB_PROCESS))
