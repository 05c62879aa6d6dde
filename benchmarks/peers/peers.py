"""The servers: packages, start commands, and the requests that each of them takes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.environments import distribution
from benchmarks.peers.requests import (
    Build,
    jpeg,
    jpeg_form,
    plain_json,
    raw,
    raw_form,
    text,
    text_json,
    v2,
    v2_binary,
    v2_jpeg,
    v2_text,
)

ADAPTERS = Path(__file__).parent / "adapters"
NO_V2 = "has no `/v2` routes"


def common(*loose: str) -> tuple[str, ...]:
    """Return the packages of every adapter, in this project's versions except for the loose ones."""
    listed = ("onnxruntime", "numpy", "orjson", "pillow")
    pinned = {name: f"{name}=={importlib.metadata.version(name)}" for name in listed if name not in loose}
    return (*(pinned.get(name, name) for name in listed), "tokenizers")


@dataclass(frozen=True)
class Peer:
    """A server beside which Inferpool is measured, or Inferpool itself."""

    name: str
    title: str
    settings: str
    """The settings, in words for the table."""
    requests: Mapping[str, Build]
    """By kind of body, how a request is made."""
    cannot: Mapping[str, str] = field(default_factory=dict)
    """By kind of body, why the peer takes none."""
    requirements: tuple[str, ...] = ()
    """The peer itself first; none for what runs in this project's own environment."""
    needs: tuple[str, ...] = ()
    """Commands that the machine has to have."""
    relaxed: tuple[str, ...] = ()
    """Dependencies taken at any version."""
    batches: bool = True
    adapter: str = ""
    flags: tuple[str, ...] = ()
    """More arguments of Inferpool's own command line."""

    def command(
        self, python: Path, model: Path, kind: str, port: int, rows: int, workers: int, queue: int
    ) -> list[str]:
        """The command that starts the server with this model."""
        if self.is_own:
            flags = [*self.flags, *(("--queue-ms", "500") if queue else ())]
            folder = model.parents[1]
            return [str(python), "-m", "inferpool", "serve", str(folder), "--port", str(port), *flags]
        script = self.adapter or f"{self.name.replace('-', '_')}_server.py"
        told = {"model": model, "kind": kind, "port": port, "rows": rows, "workers": workers, "queue": queue}
        words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        return [str(python), str(ADAPTERS / script), *words]

    @property
    def is_own(self) -> bool:
        """Whether this is Inferpool itself."""
        return self.name.startswith("inferpool")

    @property
    def distribution(self) -> str:
        """The package whose version is the peer's."""
        return distribution(self.requirements[0]) if self.requirements else "uvicorn"


def everything(path: str) -> dict[str, Build]:
    """A server that takes any body as it comes."""
    return {
        "json": plain_json(path), "binary": raw(path), "jpeg": jpeg(path), "text": text(path)
    }  # fmt: skip


OWN_V2 = "/v2/models/{model}/infer"
TRITON = "/v2/models/model/infer"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "inferpool", "Inferpool", "none: as it comes",
            {
                "json": plain_json("/predict"), "jpeg": jpeg("/predict"), "text": text_json("/predict"),
                "v2": v2(OWN_V2, "x"), "binary": v2_binary(OWN_V2, "x"),
            },
        ),
        Peer(
            "inferpool-process", "Inferpool, engine apart", "`--engine process`",
            {
                "json": plain_json("/predict"), "jpeg": jpeg("/predict"), "text": text_json("/predict"),
                "v2": v2(OWN_V2, "x"), "binary": v2_binary(OWN_V2, "x"),
            },
            flags=("--engine", "process"),
        ),
        Peer(
            "mosec", "Mosec", "Rust front; wait of 1 ms, the least it takes; orjson",
            everything("/inference"), {"v2": NO_V2},
            ("mosec==0.9.8", *common()),
        ),
        Peer(
            "litserve", "LitServe", "one API server, wait of 1 ms; fast queue, which 0.2.19 ignores",
            {
                "json": plain_json("/predict"), "text": text_json("/predict"),
                "binary": raw_form("/predict", "file"), "jpeg": jpeg_form("/predict", "file"),
            },
            {"v2": NO_V2},
            ("litserve==0.2.19", "python-multipart", *common()),
        ),
        Peer(
            "bentoml", "BentoML", "adaptive batching, no access log",
            {
                "json": plain_json("/predict"), "text": text_json("/predict"),
                "jpeg": jpeg_form("/predict", "inputs"),
            },
            {"v2": NO_V2, "binary": "takes arrays as JSON only"},
            ("bentoml==1.4.40", *common()),
            relaxed=("certifi",),  # asks for one of its own release day, which mirrors lag behind
        ),
        Peer(
            "mlserver", "MLServer", "adaptive batching of 1 ms; one session: in the web server's process",
            {"json": v2(TRITON, "inputs"), "v2": v2(TRITON, "inputs"), "text": v2_text(TRITON, "inputs")},
            {"binary": "has no binary tensors over HTTP", "jpeg": "takes images as base64 in JSON only"},
            # Its workers get an event loop in a way that later versions of uvloop refuse.
            ("mlserver==1.7.1", "uvloop<0.22", *common()),
        ),
        Peer(
            "ray", "Ray Serve", "throughput-optimised, `@serve.batch` with a wait of 1 ms",
            everything("/"), {"v2": NO_V2},
            ("ray[serve]==2.60.0", *common()),
        ),
        Peer(
            "torchserve", "TorchServe", "own handler around ONNX Runtime, batch delay of 1 ms",
            everything("/predictions/model"), {"v2": "has `/v2` routes within KServe only"},
            ("torchserve==0.12.0", "torch==2.13.0", "psutil", "packaging", "requests", *common()),
            needs=("java",),
        ),
        Peer(
            "pytriton", "Triton (PyTriton)", "dynamic batcher without delay, Python backend",
            {
                "json": v2(TRITON, "inputs"), "v2": v2(TRITON, "inputs"),
                "binary": v2_binary(TRITON, "inputs"), "jpeg": v2_jpeg(TRITON, "inputs"),
                "text": v2_text(TRITON, "inputs"),
            },
            {}, ("nvidia-pytriton==0.7.0", *common("numpy")),
        ),
        Peer(
            "fastapi", "FastAPI, pydantic body", "no batching, no access log",
            {
                "json": plain_json("/predict"), "text": text_json("/predict"),
                "binary": raw_form("/predict", "file"), "jpeg": jpeg_form("/predict", "file"),
            },
            {"v2": NO_V2}, batches=False,
        ),
        Peer(
            "fastapi-bare", "FastAPI, orjson", "no pydantic, no batching, no access log",
            everything("/predict"), {"v2": NO_V2}, batches=False,
        ),
        Peer(
            "floor-asgi", "floor: raw ASGI on uvicorn", "one batching thread",
            everything("/predict"), {"v2": NO_V2}, adapter="floor_asgi.py",
        ),
        Peer(
            "floor-protocol", "floor: asyncio protocol on httptools", "one batching thread",
            everything("/predict"), {"v2": NO_V2}, adapter="floor_protocol.py",
        ),
    )
}  # fmt: skip
