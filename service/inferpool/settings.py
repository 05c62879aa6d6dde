"""The settings of a server: one frozen object, and what its fields may be. `settings_sources` reads them.

The fields below are the only table of settings: `inferpool serve --help` prints it, and a test compares the
documentation with it. The names contain the units.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inferpool.system.gpus import AUTO, check_devices
from inferpool.system.memory import COPIES, COPIES_APART, chosen_limit, in_flight_bytes

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]\\]+)(:[0-9]{1,5})?")
_USUAL_PORTS: Final = {"http": ":80", "https": ":443"}
_PUBLIC_SCOPES: Final = ("metrics", "read", "predict")
_ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Only algorithms of public keys: with a shared secret, whoever verifies a token could also make one."""
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Every setting with its default and the description that `--help` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on; 0.0.0.0 listens on all IPv4 addresses of the machine, :: on all of"
        " IPv6 and IPv4.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="Port to listen on; 0 takes a free port, which the log names."
    )
    cors_allow_origin: tuple[str, ...] = Field(
        default=(),
        description="Origins whose web pages may use the server from a browser, separated by commas, or * for"
        " every origin; https://app.example.com for example.",
    )
    unix_socket: Path | None = Field(
        default=None, description="Unix socket to listen on, in place of `host` and `port`."
    )
    unix_socket_mode: str = Field(
        default="660",
        pattern="^[0-7]{3}$",
        description="Permissions of the file of `unix_socket`, in octal digits: who may connect.",
    )
    grpc_port: Annotated[int, Field(ge=0, le=65_535)] | None = Field(
        default=None,
        description="TCP port of the Open Inference Protocol over gRPC, which a process of its own serves; 0"
        " takes a free port. Without it there is no gRPC. See docs/grpc.md.",
    )
    tls_certificate_file: Path | None = Field(
        default=None,
        description="PEM file with the server's certificate and those between it and its authority. With it,"
        " the server takes HTTPS alone. Renewed files are noticed.",
    )
    tls_key_file: Path | None = Field(
        default=None,
        description="PEM file with the private key; by default it is in `tls_certificate_file`.",
    )
    tls_client_ca_file: Path | None = Field(
        default=None,
        description="PEM file of authorities; clients without a certificate of one of them are refused.",
    )
    tls_client_scopes: tuple[str, ...] = Field(
        default=(),
        description="Scopes that clients have by their certificate, without a key, separated by commas:"
        " predict,read for example. The tenant is the name in the subject of the certificate.",
    )
    keep_alive_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = Field(
        default=75.0,
        description="Seconds that an idle connection stays open; more than the load balancer in front keeps"
        " its own.",
    )
    max_head_bytes: Annotated[int, Field(ge=1024, le=2**20)] = Field(
        default=64 * 1024,
        description="Largest request line with headers, in bytes; larger ones are refused with status 431.",
    )
    connections_per_address: Annotated[int, Field(ge=0, le=65_535)] = Field(
        default=0,
        description="Connections that clients of one address (of IPv6: one /64 network) may have at once; 0"
        " sets no limit.",
    )
    root_path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*$")] = Field(
        default="",
        description="Path below which a proxy offers the server, as /inferpool. Requests may come with it or"
        " without.",
    )
    predict_route: Annotated[str, Field(pattern=r"^/[^\s?#]*[^\s?#/]$")] | None = Field(
        default=None,
        description="One more path that answers predictions, in the forms that platforms use; by default that"
        " of AIP_PREDICT_ROUTE.",
    )
    health_route: Annotated[str, Field(pattern=r"^/[^\s?#]*[^\s?#/]$")] | None = Field(
        default=None,
        description="One more path that answers as /health/ready does; by default that of AIP_HEALTH_ROUTE.",
    )
    drain_settle_s: _Number = Field(
        default=0.0,
        description="Seconds after SIGTERM in which requests are still accepted, so that load balancers can"
        " notice.",
    )
    drain_timeout_s: _Number = Field(
        default=30.0, description="Seconds that accepted requests may take to finish after the settle time."
    )
    max_body_bytes: Annotated[int, Field(ge=1, le=2**40)] = Field(
        default=64 * 1024 * 1024, description="Largest request body in bytes, before and after decompression."
    )
    explain_max_passes: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=10_000,
        description="Rows that a model may run for one explanation; 0 switches explanations off.",
    )
    explain_max_ms: Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)] = Field(
        default=10_000.0,
        description="Milliseconds that an explanation may take; it ends with what has been run by then.",
    )
    memory_bytes: Annotated[int, Field(ge=0, le=2**50)] = Field(
        default=0,
        description="Bytes of memory that the server may take; 0 takes the limit of the cgroup, or without"
        " one the memory of the machine.",
    )
    in_flight_bytes: Annotated[int, Field(ge=0, le=2**50)] = Field(
        default=0,
        description="Bytes that the requests of all models together may hold; 0 takes half of the memory that"
        " loaded models leave, or a third if `engine` is process, up to 4 GiB.",
    )
    cache_bytes: Annotated[int, Field(ge=0, le=2**50)] = Field(
        default=64 * 1024 * 1024,
        description="Bytes of cached outputs of all models whose `model.toml` enables the cache, at most a"
        " sixteenth of the memory; each web process has its part. 0 turns all caches off.",
    )
    queue_bytes: Annotated[int, Field(ge=0, le=2**50)] = Field(
        default=0,
        description="Bytes of inputs that may wait for one model; 0 takes half of `in_flight_bytes`.",
    )
    queue_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=5000.0, description="Milliseconds of work that may wait for one model, by its measured rate."
    )
    run_timeout_s: _Number = Field(
        default=300.0,
        description="Seconds that a model may run for one batch; a run that takes longer is stopped, and"
        " answered with status 504. 0 sets no limit.",
    )
    engine: Literal["in-process", "process"] = Field(
        default="in-process",
        description="Where models run: in-process (in the process that answers requests), or process (in"
        " processes of their own, so that a model that crashes ends no request).",
    )
    engines_per_device: Annotated[int, Field(ge=1, le=16)] = Field(
        default=1,
        description="Engines for each device, if `engine` is process. Each has all versions of its device:"
        " with 2, one goes on while the other is replaced after a crash, for twice the memory.",
    )
    web_processes: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0,
        description="Processes that read requests and write answers; 0 takes one for every"
        " four cores, or every two if models run on GPUs, and at least one."
        " More than one need `engine` to be process.",
    )
    model_name: Annotated[str, Field(pattern=r"^[^\s/._][^\s/]*$")] | None = Field(
        default=None,
        description="Name of the model, if the server has only one; its own name remains as an alias.",
    )
    repository_wait_s: _Number = Field(
        default=0.0,
        description="Seconds to wait at start for models to appear in REPOSITORY, if it is a mount that comes"
        " late; the server is live and not ready meanwhile. Where a platform mounts models, the default is"
        " 300.",
    )
    threads: Annotated[int, Field(ge=0, le=4096)] = Field(
        default=0,
        description="CPU cores for models; 0 takes those of the affinity mask and the cgroup quota.",
    )
    devices: tuple[str, ...] = Field(
        default=(AUTO,),
        description="Where models run: auto (every visible GPU that their runtime can use, else the CPU),"
        " cpu, or GPUs by name, separated by commas: cuda:0,cuda:1.",
    )
    measure_ms: _Number = Field(
        default=2000.0,
        description="Longest time in milliseconds to measure one model at load; 0 disables measuring.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder for measurements, models from stores and the environments of build scripts; by"
        " default in the user's cache folder.",
    )
    plans_dir: Path | None = Field(
        default=None,
        description="Folder that is only read, with measurements that another start on an equal machine has"
        " kept in its cache folder: those in an image, for example.",
    )
    trust: bool = Field(
        default=False,
        description="Load model files that can run code when loaded (.pt, .pt2), from any source.",
    )
    require_signatures: tuple[Path, ...] = Field(
        default=(),
        description="PEM files with public keys, or with certificates of authorities, separated by commas:"
        " versions that none of them has signed are refused. See docs/signatures.md.",
    )
    load_timeout_s: Annotated[float, Field(gt=0, le=604_800)] = Field(
        default=600.0,
        description="Seconds that a version may take to load; a version that takes longer has failed.",
    )
    silence_timeout_s: _Number = Field(
        default=15.0,
        description="Seconds for which a process of the server may show no sign of life, because it is"
        " stopped or one thread lets no other one run; then it is ended and replaced. An engine that loads is"
        " given `load_timeout_s`. 0 sets no limit.",
    )
    watch: bool = Field(
        default=False,
        description="Watch the models folder, or ask its store again: load new and changed versions while the"
        " server serves, and drain deleted ones.",
    )
    store_poll_s: Annotated[float, Field(ge=1, le=604_800)] = Field(
        default=60.0,
        description="Seconds between two questions to a store whether its models have changed, with `watch`.",
    )
    keep_warm_s: Annotated[float, Field(ge=0, le=604_800)] = Field(
        default=60.0,
        description="Seconds for which a version goes on serving after a newer one has taken its place"
        ' (`versions.serve = "latest"`), so that a rollback takes no load.',
    )
    load_from: tuple[str, ...] = Field(
        default=(),
        description="Prefixes of stores, and absolute paths of folders, from which `POST /models/MODEL/load`"
        " may take versions, separated by commas: s3://bucket/models,https://models.example.com/,/srv/new."
        " Whoever may write there can have the server load any files.",
    )
    required_models: tuple[str, ...] = Field(
        default=(), description="Models that must be ready before the server is ready, separated by commas."
    )
    tenants_file: Path | None = Field(
        default=None,
        description="TOML file of tenants: their shares, rates and priorities; it is read again when it"
        " changes. Keys say to which tenant a request belongs.",
    )
    samples_dir: Path | None = Field(
        default=None,
        description="Folder for encrypted samples of requests, of models whose `model.toml` has `[samples]`.",
    )
    samples_keys_file: Path | None = Field(
        default=None,
        description="File of the keys that encrypt samples, which `inferpool samples new-key` writes; without"
        " it, the variable INFERPOOL_SAMPLES_KEYS has its content.",
    )
    samples_bytes: Annotated[int, Field(ge=2**16, le=2**50)] = Field(
        default=64 * 1024 * 1024, description="Bytes of samples that are held; the oldest ones make room."
    )
    samples_count: Annotated[int, Field(ge=1, le=10**9)] = Field(
        default=100_000, description="Samples that are held; the oldest ones make room."
    )
    samples_days: Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)] = Field(
        default=30.0, description="Days after which a sample is deleted."
    )
    keys_file: Path | None = Field(
        default=None,
        description="File of keys, which `inferpool key new` writes. With it every request but those for"
        " health needs a key. The file is read again when it changes.",
    )
    public_scopes: tuple[str, ...] = Field(
        default=(),
        description="Scopes that need no key although keys are set, separated by commas: metrics, read,"
        " predict.",
    )
    admin_routes: Literal["auto", "off", "on"] = Field(
        default="auto",
        description="Routes that change what is served: auto (for keys with the scope admin), off (for"
        " nobody), on (also without keys, for every program of this machine; `host` must be a loopback"
        " address then).",
    )
    admin_socket: Path | None = Field(
        default=None,
        description="Path of a Unix socket whose requests may use the admin routes without a key; only the"
        " user of the server can open it.",
    )
    jwt_keys: str | None = Field(
        default=None,
        description="Address or file of the JSON Web Key Set of an issuer whose tokens (JWT) are accepted as"
        " keys; needs `jwt_issuer` and `jwt_audience`.",
    )
    jwt_issuer: str | None = Field(
        default=None, description="Issuer of the tokens: the value of their claim iss."
    )
    jwt_audience: tuple[str, ...] = Field(
        default=(),
        description="Audiences of which a token must have one in its claim aud, separated by commas.",
    )
    jwt_algorithms: tuple[str, ...] = Field(
        default=("RS256", "ES256", "EdDSA"),
        description="Algorithms that tokens may be signed with, separated by commas.",
    )
    jwt_scope_claim: str = Field(
        default="scope",
        description="Claim with the scopes of a token; realm_access.roles means a claim within a claim.",
    )
    jwt_scopes: tuple[str, ...] = Field(
        default=(),
        description="Scopes that values of this claim mean, separated by commas: ml-team=predict,ops=admin."
        " By default a value is itself the scope.",
    )
    jwt_tenant_claim: str = Field(default="sub", description="Claim with the tenant of a token.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="Format of log lines; auto is console on a terminal, else json."
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(),
        description="Proxies whose X-Forwarded-For the log believes: addresses and networks, separated by"
        " commas, and unix for whoever uses a Unix socket.",
    )
    image_urls: tuple[str, ...] = Field(
        default=(),
        description="Hosts whose pictures requests may name by their URLs, separated by commas:"
        " images.example.com for https, http://images.local:9000, and networks such as 10.0.0.0/8 in which"
        " their addresses may be although they are private.",
    )
    access_log: bool = Field(
        default=False, description="Log every predict request, not only those that end with status 500."
    )

    @field_validator("public_scopes")
    @classmethod
    def _scopes_may_be_public(cls, scopes: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [scope for scope in scopes if scope not in _PUBLIC_SCOPES]:
            raise ValueError(f'"{wrong[0]}" cannot be public; metrics, read and predict can')
        return scopes

    @field_validator("load_from")
    @classmethod
    def _are_prefixes(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            if not re.fullmatch(r"(s3|gs|az|https?|hf|oci)://[^/@?#]+(/[^?#]*)?|/.*", prefix):
                raise ValueError(
                    f'"{prefix}" is no prefix of a store (s3://bucket/models) and no absolute path'
                )
        return prefixes

    @field_validator("jwt_algorithms")
    @classmethod
    def _algorithms_use_public_keys(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in algorithms if name not in _ALGORITHMS]:
            raise ValueError(f'"{wrong[0]}" is not among {", ".join(_ALGORITHMS)}')
        return algorithms

    @field_validator("jwt_scopes")
    @classmethod
    def _scopes_are_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
            raise ValueError(f'"{wrong[0]}" is not a value of the claim, an equals sign and a scope')
        return pairs

    @field_validator("devices")
    @classmethod
    def _devices_are_names(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        check_devices(devices)
        return devices

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for text in networks:
            if text != "unix":
                try:
                    ipaddress.ip_network(text)
                except ValueError as error:
                    raise ValueError(f"{error}; write an address, a network or unix") from None
        return networks

    @field_validator("cors_allow_origin")
    @classmethod
    def _origins_are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_origin(text) for text in origins))

    @model_validator(mode="after")
    def _tokens_are_complete(self) -> Settings:
        if self.jwt_keys is not None and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError("jwt_keys needs jwt_issuer and jwt_audience, which the tokens must have")
        if self.jwt_keys is None and (self.jwt_issuer or self.jwt_audience):
            raise ValueError("jwt_issuer and jwt_audience need jwt_keys, the address of the issuer's keys")
        return self

    @model_validator(mode="after")
    def _tls_has_a_certificate(self) -> Settings:
        if self.tls_certificate_file is None and (self.tls_key_file or self.tls_client_ca_file):
            name = "tls_key_file" if self.tls_key_file else "tls_client_ca_file"
            raise ValueError(f"{name} is set, and tls_certificate_file is not; set both, or none")
        return self

    @model_validator(mode="after")
    def _certificates_are_asked_for(self) -> Settings:
        if self.tls_client_scopes and self.tls_client_ca_file is None:
            raise ValueError(
                "tls_client_scopes is set, and tls_client_ca_file is not, without which no client shows a"
                " certificate; set both, or none"
            )
        return self

    @model_validator(mode="after")
    def _processes_fit(self) -> Settings:
        if self.engine == "in-process" and self.engines_per_device > 1:
            raise ValueError(
                f"engines_per_device is {self.engines_per_device}, and engine is in-process, which has none;"
                " set --engine process, or --engines-per-device 1"
            )
        if self.engine == "in-process" and self.web_processes > 1:
            raise ValueError(
                f"web_processes is {self.web_processes}, and engine is in-process, which allows 1; set"
                " --engine process, or --web-processes 1"
            )
        return self


def _origin(text: str) -> str:
    """Return an origin as browsers spell it; raises ValueError for what is no origin."""
    if text == "*":
        return text
    origin = text.lower()
    if not _ORIGIN.fullmatch(origin) or not origin.isascii():
        near = _ORIGIN.match(origin)
        hint = f"; did you mean {near[0]}?" if near is not None else ""
        raise ValueError(f'"{text}" is no origin; write scheme://host or scheme://host:port, or *{hint}')
    scheme = origin.partition(":")[0]
    return origin.removesuffix(_USUAL_PORTS.get(scheme, "-"))


def with_memory(settings: Settings) -> Settings:
    """The settings, with the bytes that follow from the memory there is in place of zeros."""
    limit = chosen_limit(settings.memory_bytes)
    copies = COPIES_APART if settings.engine == "process" else COPIES
    in_flight = settings.in_flight_bytes or in_flight_bytes(limit.limit, limit.held(), copies)
    return settings.model_copy(
        update={"in_flight_bytes": in_flight, "queue_bytes": settings.queue_bytes or max(1, in_flight // 2)}
    )
