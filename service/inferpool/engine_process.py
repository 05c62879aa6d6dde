"""The main of an engine: it loads models, and runs them for the web processes.

The main thread listens to the supervisor. Requests arrive in the thread of the port, and run in the threads
of the instances. A spare is an engine that waits to be told what to load, until another engine ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from inferpool.backends.registry import describe_backends, find_backend
from inferpool.engine.catalog_parcel import unpack
from inferpool.engine.control import ControlSocket, Message
from inferpool.engine.engine_memory import EngineMemory, engine_system
from inferpool.engine.engine_port import EnginePort
from inferpool.engine.spawn import begin_child, name_process
from inferpool.errors import ConfigError, LoadError, Reason
from inferpool.observe.build_info import build_info
from inferpool.observe.gpu_metrics import gpu_readings
from inferpool.observe.logs import configure_logs
from inferpool.observe.metrics import Metrics
from inferpool.observe.regions import Regions
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog_publisher import CatalogPublisher, answer_ask
from inferpool.repository.engine_admin import answer_admin
from inferpool.repository.repository import Repository
from inferpool.repository.stores.polling import locate
from inferpool.repository.version_source import held_from_json
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.every_second import EverySecond
from inferpool.system.gpus import CPU, cuda_driver
from inferpool.system.memory import chosen_limit, keep_freed_memory, release_freed_memory

log = logging.getLogger(__name__)

NAME: Final = "inferpool-eng"
SPARE_NAME: Final = "inferpool-spare"
GIL_SWITCH_S: Final = 0.001
SEEN_S: Final = 10.0
"""How long web processes may take to learn what has changed."""
HUNG_STATUS: Final = 70
"""The exit status of an engine that ends because a run does not stop (EX_SOFTWARE of sysexits.h)."""


class Engine:
    """The models of one engine process, and its ties to the supervisor and the web processes."""

    def __init__(self, control: ControlSocket, start: Message, settings: Settings) -> None:
        """`start` is the message that says what to load. Raises ConfigError if there is nothing to serve."""
        facts = start.values
        metrics_file, plans_file = start.descriptors
        kept = unpack(plans_file).catalog
        os.close(plans_file)
        device = kept["device"]
        if device == CPU and kept["share"] > 1:
            # Each engine of the CPU has its part of the cores.
            cores = max(1, (settings.threads or usable_cores()) // kept["share"])
            settings = settings.model_copy(update={"threads": cores})
        self._device: str = device
        info = build_info(describe_backends())
        control.send("hello", {"info": info})
        regions = None if facts["slot"] is None else Regions(metrics_file, facts["slot"])
        self._control = control
        self._settings = settings
        self._publishing = threading.Lock()
        self._gpus_watched = False
        self._asking = threading.Lock()
        self._seen = threading.Event()
        self._frozen = False
        self._port = EnginePort(time.monotonic)
        self._metrics = Metrics(info, regions)
        folder, origin = locate(facts["repository"], settings)
        self._repository = Repository(
            folder,
            settings,
            self._port,
            self._metrics,
            time.monotonic,
            only=None if kept["only"] is None else [VersionKey(*version) for version in kept["only"]],
            skip=[VersionKey(*version) for version in kept["skip"]],
            on_loading=self._report_loading,
            on_change=self._publish,
            plans=kept["plans"],
            held={VersionKey(model, number): held_from_json(table) for model, number, table in kept["held"]},
            moves=kept["moves"],
            traffic=kept["traffic"],
            on_hung=self._end,
            takes_new=kept["takes_new"],
            device=device,
            until_seen=self._await_seen,
            origin=origin,
        )
        self._memory = EngineMemory(
            engine_system(chosen_limit(settings.memory_bytes)),
            lambda: not self._port.unanswered,
            self._repository.router.release_memory,
        )
        self._publisher = CatalogPublisher(self._repository)
        self._port.start(self._repository.router, lambda question: answer_ask(self._repository, question))

    def run(self) -> int:
        """Serve until the supervisor says that it is over; returns the exit status."""
        self._metrics.publish()
        EverySecond(
            {"publishing the gauges": self._metrics.publish, "looking at the memory": self._memory.look}
        ).start()
        self._publish()
        self._repository.start(self._loaded, lambda reason: self._control.send("refused", {"reason": reason}))
        while True:
            message = self._control.wait()
            if message.kind == "drain":
                return self._drain(message.values["timeout_s"])
            self._obey(message)

    def _obey(self, message: Message) -> None:
        if message.kind == "admin":
            threading.Thread(target=self._administer, args=(message.values,), daemon=True).start()
            return
        if message.kind == "seen":
            self._seen.set()
            return
        if message.kind == "decisions":
            (told,) = message.descriptors
            decided = unpack(told).catalog
            os.close(told)
            self._repository.routing.take(decided["moves"], decided["traffic"])
            return
        if message.kind == "rescan":
            self._repository.watch.look()
            self._control.send("rescanned")
            return
        web = message.values["web"]
        if message.kind == "connect":
            data, arena = message.descriptors
            self._port.connect(web, message.values["epoch"], socket.socket(fileno=data), arena)
        elif message.kind == "disconnect":
            self._port.disconnect(web)

    def _administer(self, values: Mapping[str, Any]) -> None:
        """Do what a web process has asked, in a thread, because it looks at files."""
        answer = answer_admin(self._repository, values)
        self._control.send("answer", {"web": values["web"], "id": values["id"], **answer})

    def _await_seen(self) -> None:
        """Wait until all web processes have the catalog that was sent last."""
        with self._asking:
            self._seen.clear()
            self._control.send("await_seen")
            if not self._seen.wait(SEEN_S):
                log.warning("a web process has not taken the last catalog for %g s", SEEN_S)

    def _drain(self, timeout_s: float) -> int:
        ok = self._repository.drain(timeout_s)
        ok = self._port.close() and ok
        self._control.send("drained", {"ok": ok})
        return 0

    def _end(self, key: VersionKey, reason: Reason) -> None:
        """End this process, because a run does not stop; a successor runs whatever else it had."""
        self._control.send("hung", {"version": key, "reason": reason})
        logging.shutdown()
        os._exit(HUNG_STATUS)

    def _report_loading(self, key: VersionKey) -> None:
        self._control.send("loading", {"model": key.model, "version": key.version})

    def _publish(self) -> None:
        # The lock keeps two catalogs from arriving in the wrong order.
        with self._publishing:
            descriptor = self._publisher.pack()
            try:
                self._control.send("models", {}, [descriptor])
            finally:
                os.close(descriptor)

    def _loaded(self) -> None:
        if not self._frozen:
            # Most loaded models live as long as the process: the garbage collector need not traverse them.
            # Later loads leave that alone, because requests would wait.
            gc.collect()
            gc.freeze()
            self._frozen = True
        self._watch_gpus()
        self._memory.settle(bound_data=self._device == CPU)
        self._control.send("loaded", {"backends": self._repository.backends()})

    def _watch_gpus(self) -> None:
        """Export the readings of the GPUs once a model runs on one; a later load may be the first."""
        if self._gpus_watched:
            return
        models, live = self._repository.models(), self._repository.live
        keys = [version.key for model in models.values() for version in model.versions.values()]
        used = {instance.device for key in keys for instance in live(key).instances}
        # Another engine has each other GPU.
        gpus = [gpu for gpu in cuda_driver().gpus() if gpu.device == self._device]
        if used - {CPU} and (readings := gpu_readings(gpus)) is not None:
            self._metrics.add_source(readings)
            self._gpus_watched = True


def _prepare(backends: list[str]) -> None:
    """Import what an engine needs, so that this process can take the place of one that ends."""
    describe_backends()
    for name in backends:
        with contextlib.suppress(LoadError):
            find_backend(name).import_runtime()
    gc.collect()
    release_freed_memory()


def main() -> int:
    """Run an engine that `inferpool.engine.spawn` has started."""
    keep_freed_memory()
    control = begin_child(SPARE_NAME)
    try:
        start = control.wait()
        if start.kind == "prepare":
            _prepare(start.values["backends"])
            start = control.wait()
        name_process(NAME)
        settings = Settings.model_validate(start.values["settings"])
        configure_logs(settings.log_level, settings.log_format, process=f"engine {start.values['engine']}")
        sys.setswitchinterval(GIL_SWITCH_S)
        try:
            engine = Engine(control, start, settings)
        except ConfigError as error:
            control.send("refused", {"reason": error.detail})
            return 1
        status = engine.run()
    except EOFError:  # the supervisor has ended
        status = 1
    # The usual exit destroys what a thread that loads or runs still uses, and a native library then aborts.
    logging.shutdown()
    os._exit(status)
