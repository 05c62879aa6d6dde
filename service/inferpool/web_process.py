"""The main of a web process: it reads requests and writes answers, and engines run the models."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Final

from inferpool.engine.catalog_parcel import unpack
from inferpool.engine.client import EngineClient
from inferpool.engine.client_router import ClientRouter
from inferpool.engine.control import ControlSocket, Message
from inferpool.engine.spawn import begin_child
from inferpool.errors import ConfigError, Draining, NotReady
from inferpool.http.access.trusted_proxies import make_proxies
from inferpool.http.predict.memory_monitor import this_system
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.build_info import build_info
from inferpool.observe.logs import AccessLog, configure_logs
from inferpool.observe.metrics import Metrics
from inferpool.observe.regions import Regions
from inferpool.observe.spans import make_spans
from inferpool.pool.ports import VersionKey
from inferpool.pool.token_buckets import MEMORY_BYTES
from inferpool.repository.catalog import DRAINING, LOADING, UNLOADED
from inferpool.repository.catalog_readings import catalog_readings
from inferpool.repository.remote_admin import RemoteAdmin
from inferpool.repository.remote_catalog import RemoteCatalog
from inferpool.repository.rollout import RolloutWatch
from inferpool.server import Server, report_installation
from inferpool.server_parts import make_server_parts
from inferpool.settings import Settings
from inferpool.system.connection_counts import ConnectionCounts
from inferpool.system.memory import family_held, keep_freed_memory

log = logging.getLogger(__name__)

GIL_SWITCH_S: Final = 0.001
MOST_PROBLEMS: Final = 100
"""Problems that the supervisor is told, for the log: a message has no room for thousands."""
MOST_PROBLEM_CHARACTERS: Final = 500
SPANS_TIMEOUT_S: Final = 2.0
"""How long the process may take at its end to send the remaining spans."""


class WebServer(Server):
    """The server of a web process. The supervisor tells it what is served, and when to drain."""

    def __init__(
        self,
        control: ControlSocket,
        catalog: RemoteCatalog,
        router: ClientRouter,
        web: int,
        counts: ConnectionCounts,
        admin: RemoteAdmin,
        *parts: Any,
    ) -> None:
        """`web` is the number of this process; `parts` are the arguments of `Server`."""
        super().__init__(*parts)
        self._control = control
        self._catalog = catalog
        self._router = router
        self._web = web
        self.name = f"web-{web}"
        self.counts = counts
        # One process has the socket: two cannot listen on one path.
        self.has_admin_socket = self.has_admin_socket and web == 1
        self._clients: dict[str, EngineClient] = {}
        # Catalogs with their numbers; answers to admin acts, which are told after what they changed; None
        # only asks to route.
        self._catalogs: asyncio.Queue[tuple[int, int] | Mapping[str, Any] | None] = asyncio.Queue()
        self._admin = admin
        self._settled = False
        self._informed = asyncio.Event()

    def begin(self, listeners: list[socket.socket]) -> None:
        """Listen to the supervisor."""
        assert self.loop is not None
        self.loop.add_reader(self._control.fileno(), self._hear)
        self._metrics.publish()
        self._updates = self.loop.create_task(self._take_catalogs())

    async def wait_informed(self) -> None:
        """Wait for the catalog: a process that replaces another must not deny that there are models."""
        await self._informed.wait()

    def report_listening(self) -> None:
        """Tell the supervisor."""
        self._control.send("listening")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the supervisor."""
        yield

    def report_drain(self) -> None:
        """Report that the server is not ready."""
        self._catalog.begin_drain()

    def report_settled(self) -> None:
        """Leave the report to the supervisor."""

    async def drain_models(self, timeout_s: float) -> bool:
        """Answer what is not answered in time. The rest is the supervisor's: others may need the models."""
        for client in self._clients.values():
            client.refuse_all(lambda: Draining("the server is shutting down"))
        return True

    def _hear(self) -> None:
        try:
            while (message := self._control.receive()) is not None:
                self._obey(message)
        except EOFError:  # the supervisor has ended
            os._exit(1)

    def _obey(self, message: Message) -> None:
        values = message.values
        if message.kind == "models":
            self._catalogs.put_nowait((values["catalog"], message.descriptors[0]))
        elif message.kind == "engine" and values["up"]:
            self._connect(values["engine"], values["epoch"], *message.descriptors)
        elif message.kind == "engine":
            self._disconnect(values["engine"], values["epoch"], blame=values["blame"], gone=values["gone"])
        elif message.kind == "expect":
            self._client(values["engine"]).expect(message.descriptors[0])
            self._route()
        elif message.kind == "answer":
            self._catalogs.put_nowait(values)
        elif message.kind == "info":
            self._metrics.info = values["info"]
        elif message.kind == "drain":
            self.begin_drain()

    def _client(self, engine: str) -> EngineClient:
        client = self._clients.get(engine)
        if client is None:
            assert self.loop is not None
            client = self._clients[engine] = EngineClient(
                self._results,
                self.loop,
                time.monotonic,
                self._web,
                partial(self._report_broken, engine),
                self._route_later,
                metrics=self._metrics,
            )
        return client

    def _connect(self, engine: str, epoch: int, data: int, arena: int) -> None:
        client = self._client(engine)
        client.attach(epoch, socket.socket(fileno=data), arena)
        self._catalog.engine_up(engine, partial(_ask, client))
        self._route()

    def _disconnect(self, engine: str, epoch: int, *, blame: bool, gone: bool) -> None:
        client = self._clients.get(engine)
        running, confirmed = ([], []) if client is None else client.detach(epoch, blame=blame)
        self._catalog.engine_down(engine)
        self._route()  # other engines may have the versions
        self._control.send(
            "crashed",
            {
                "engine": engine,
                "epoch": epoch,
                "versions": [list(key) for key in running],
                "confirmed": [list(key) for key in confirmed],
            },
        )
        if gone and client is not None:
            del self._clients[engine]
            client.close()
            client.give_up(lambda: NotReady("the model has failed; /models says why"))
            self._route()

    def _report_broken(self, engine: str, epoch: int, reason: str) -> None:
        self._catalog.engine_down(engine)
        self._control.send("broken", {"engine": engine, "epoch": epoch, "reason": reason})

    def _route_later(self) -> None:
        """Route again once all catalogs that have come are taken."""
        self._catalogs.put_nowait(None)

    def _route(self) -> None:
        clients: dict[VersionKey, list[EngineClient]] = {}
        for model in self._catalog.models().values():
            for version in model.versions.values():
                names = self._catalog.engines_of(version.key)
                found = [self._clients[name] for name in names if name in self._clients]
                # Once the supervisor knows that this is seen, a version that drains gets no more requests.
                if found and version.state not in (DRAINING, UNLOADED):
                    clients[version.key] = found
        self._router.route(clients)

    async def _take_catalogs(self) -> None:
        while True:
            news = await self._catalogs.get()
            if isinstance(news, Mapping):
                self._admin.take_answer(news)
                continue
            if news is None:
                self._route()
                continue
            number, descriptor = news
            try:
                # In a thread: making codecs may take a second.
                await asyncio.to_thread(self._take_catalog, descriptor)
            except Exception:
                log.exception("a catalog cannot be used")
            finally:
                os.close(descriptor)
            self._route()
            await self._catalog.refresh()
            self._informed.set()
            health = self._catalog.health()
            models = self._catalog.models()
            self._control.send(
                "seen",
                {
                    "catalog": number,
                    "status": health.status,
                    "problems": {
                        name: problem[:MOST_PROBLEM_CHARACTERS]
                        for name, problem in islice(health.problems.items(), MOST_PROBLEMS)
                    },
                    "models": len(models),
                },
            )
            states = {version.state for model in models.values() for version in model.versions.values()}
            if not self._settled and states and LOADING not in states:
                self._settled = True
                await asyncio.to_thread(self._settle)

    def _settle(self) -> None:
        """Take note that models have been loaded, in a thread: the memory is measured and trimmed."""
        gc.collect()
        gc.freeze()
        self._memory.settle(bound_data=False)

    def _take_catalog(self, descriptor: int) -> None:
        self._catalog.update(*unpack(descriptor))


async def _ask(client: EngineClient, question: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reply of an engine; raises ConnectionError if it ends before it replies."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def take(reply: Any) -> None:
        if not answer.done():
            answer.set_result(reply)

    client.ask(question, take)
    reply: Mapping[str, Any] | None = await answer
    if reply is None:
        raise ConnectionError("the engine has ended")
    return reply


def main() -> int:
    """Run a web process that `inferpool.engine.spawn` has started."""
    keep_freed_memory()
    control = begin_child("inferpool-web")
    start = control.wait()
    facts = start.values
    listener, counts, metrics_file, rates, *forwarded = start.descriptors
    settings = Settings.model_validate(facts["settings"])
    log_lines = configure_logs(settings.log_level, settings.log_format, process=f"web-{facts['web']}")
    sys.setswitchinterval(GIL_SWITCH_S)
    try:
        spans = make_spans()
    except ConfigError as error:
        control.send("refused", {"reason": error.detail})
        return 1
    results = ResultDispatcher()
    metrics = Metrics(facts["info"] or build_info({}), Regions(metrics_file, facts["slot"]))
    catalog = RemoteCatalog(time.monotonic, settings.required_models)
    metrics.add_source(partial(catalog_readings, catalog), published=False)
    router = ClientRouter()
    recorder = RequestRecorder(
        AccessLog(log_lines, every=settings.access_log), spans, make_proxies(settings.trusted_proxies)
    )
    system = this_system(settings.memory_bytes)
    # Engines and other web processes take of the same memory.
    system = system._replace(held=lambda: max(system.limit.held(), family_held(os.getppid())))
    admin = RemoteAdmin(catalog, control.send)
    try:
        parts = make_server_parts(
            catalog,
            router,
            results,
            metrics,
            settings,
            admin,
            recorder,
            system,
            derive=facts["derive"],
            processes=facts["webs"],
            release=router.release,
            lend=router.lend,
            rates=memoryview(mmap.mmap(rates, MEMORY_BYTES)).cast("d"),
            # One process decides for the whole server; the counts are those of all.
            rollouts=RolloutWatch(catalog, metrics, admin) if facts["web"] == 1 else None,
        )
    except ConfigError as error:
        control.send("refused", {"reason": error.detail})
        return 1
    connections = ConnectionCounts(counts, facts["web"] - 1, facts["webs"])
    server = WebServer(control, catalog, router, facts["web"], connections, admin, *parts)
    if forwarded:
        server.forwarded = socket.socket(fileno=forwarded[0])
    if facts["web"] == 1:
        report_installation()
    server.run(sockets=[socket.socket(fileno=listener)])
    control.send("drained", {"status": server.exit_status})
    if spans is not None:
        spans.close(SPANS_TIMEOUT_S)
    return server.exit_status
