"""The settings of a server: one frozen object, from flags, then `INFERPOOL_*` variables, then a TOML file.

The table below is the only one: `inferpool serve --help` and the README are made from it and checked
against it. Units are in the names.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from inferpool.errors import ConfigError
from inferpool.system.gpus import AUTO, check_devices

ENV_PREFIX = "INFERPOOL_"


class Settings(BaseModel):
    """Every setting with its default; the descriptions are what `--help` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every one of the machine's.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port to listen on; 0 takes a free one and says which."
    )
    drain_settle_s: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="On SIGTERM, how long requests are still taken, so that clients can go elsewhere.",
    )
    drain_timeout_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="On SIGTERM, how long accepted requests may take to finish, after the settling."
    )
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(
        64 * 1024 * 1024, description="Largest request body, also after decompression."
    )
    in_flight_bytes: Annotated[int, Field(ge=1)] = Field(
        512 * 1024 * 1024,
        description="Bytes of request bodies that may be in flight for all models together; also of the"
        " outputs of one request for text.",
    )
    queue_bytes: Annotated[int, Field(ge=1)] = Field(
        256 * 1024 * 1024, description="Bytes of input that may wait for one model."
    )
    queue_ms: Annotated[float, Field(gt=0)] = Field(
        5000.0, description="Work that may wait for one model, in milliseconds by its measured rate."
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="Cores that models may use; 0 takes those of the affinity mask and the cgroup quota."
    )
    devices: tuple[str, ...] = Field(
        (AUTO,),
        description="Where models run: auto (every GPU in sight that their runtime can use, else the CPU),"
        " cpu, or GPUs by name, separated by commas: cuda:0,cuda:1.",
    )
    measure_ms: Annotated[float, Field(ge=0)] = Field(
        2000.0, description="Longest time to measure one model at load; 0 does not measure."
    )
    cache_dir: Path | None = Field(
        None,
        description="Where measurements and the environments of build scripts are kept; by default the user's"
        " cache folder.",
    )
    trust: bool = Field(
        False, description="Load model files that can run code when loaded (.pt, .pt2), whoever made them."
    )
    required_models: tuple[str, ...] = Field(
        (), description="Models without which the server is not ready, separated by commas."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe lines that are logged."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="Log lines for people or machines; auto is console on a terminal, else json."
    )
    access_log: bool = Field(
        False, description="Log a line for each predict request, not only for those that end with 500."
    )

    @field_validator("devices")
    @classmethod
    def _devices_are_names(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        check_devices(devices)
        return devices


_NOT_SETTINGS = ("CONFIG", "COMPILED")
"""Variables with our prefix that are no settings: the file of settings, and a switch of the build (setup.py)."""

# Kubernetes writes these for a Service called "inferpool"; they are not ours.
_SERVICE_LINK = re.compile(r"(SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?)$")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag a setting, with its default and its variable in the help."""
    for name, info in Settings.model_fields.items():
        default = _default_text(info.default)
        text = f"{info.description} [{ENV_PREFIX}{name.upper()}; default: {default}]"
        flag = "--" + name.replace("_", "-")
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else None
        if info.annotation is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                flag, default=argparse.SUPPRESS, choices=choices, help=text, metavar=_metavar(name, choices)
            )


def read_settings(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Settings:
    """The settings: `flags` first, then variables, then `file`, then the defaults.

    Raises ConfigError, which names the setting and where it came from.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in (
        (str(file), _from_file(file) if file is not None else {}),
        ("environment", _from_environment(environ)),
        ("flag", {name: _parsed(name, value) for name, value in flags.items()}),
    ):
        for name, value in values.items():
            if name not in Settings.model_fields:
                raise ConfigError(_unknown(source, name))
            merged[name], origin[name] = value, source
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name = str(fault["loc"][0])
            said = fault["msg"].removeprefix("Value error, ")
            faults.append(f"{_spelled(origin[name], name)}: {said}, not {fault['input']!r}")
        raise ConfigError("; ".join(faults)) from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in environ.items():
        name = variable.removeprefix(ENV_PREFIX)
        if name == variable or name in _NOT_SETTINGS or _SERVICE_LINK.match(name):
            continue
        if name == "PORT" and "://" in text:
            continue
        values[name.lower()] = _parsed(name.lower(), text)
    return values


def _from_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _parsed(name: str, value: Any) -> Any:
    """A list written with commas becomes one; pydantic reads every other kind from its text."""
    info = Settings.model_fields.get(name)
    if info is not None and get_origin(info.annotation) is tuple and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _unknown(source: str, name: str) -> str:
    near = difflib.get_close_matches(name, Settings.model_fields, 1)
    hint = f"; did you mean {_spelled(source, near[0])}?" if near else ""
    return f"{_spelled(source, name)}: there is no such setting{hint}"


def _spelled(source: str, name: str) -> str:
    if source == "environment":
        return ENV_PREFIX + name.upper()
    return "--" + name.replace("_", "-") if source == "flag" else f"{source}: {name}"


def _default_text(default: Any) -> str:
    if default is None or default == ():
        return "none"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, tuple):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def _metavar(name: str, choices: Sequence[str] | None) -> str | None:
    return None if choices else name.rsplit("_", 1)[-1].upper()
