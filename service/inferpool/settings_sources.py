"""Where settings come from: flags, then `INFERPOOL_*` variables, then a TOML file, then the platform."""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import ValidationError

from inferpool.errors import ConfigError
from inferpool.settings import Settings

ENV_PREFIX: Final = "INFERPOOL_"
_NOT_SETTINGS = ("CONFIG", "COMPILED", "REPOSITORY", "URL", "KEY", "SAMPLES_KEYS")
"""Variables with our prefix that are not settings: the paths of the file and of the models, a switch of
setup.py, what the commands for a running server need, and keys, which no list of settings may show."""
_OTHER_SPELLINGS: Final = {"model_name": ("--model_name",)}
"""How platforms spell a flag."""

# Kubernetes sets these variables for Services called "inferpool" or "inferpool-...".
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT)(_\w*)?|PORT_\d+_(TCP|UDP|SCTP)(_\w*)?)$")
_SERVICE_PORT = re.compile(r"(\w+_)?PORT$")


CHECK_SETTINGS: Final = ("threads", "devices", "measure_ms", "cache_dir", "trust", "require_signatures")
"""The settings that `inferpool check` depends on; all others are about serving."""
FETCH_SETTINGS: Final = ("cache_dir", "log_level", "log_format")
"""The settings that `inferpool fetch` depends on."""


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] = tuple(Settings.model_fields)) -> None:
    """Add one flag to `parser` for each setting in `names`; the help has the default and the variable."""
    for name in names:
        info = Settings.model_fields[name]
        default = _default_text(info.default)
        text = f"{info.description} [{ENV_PREFIX}{name.upper()}; default: {default}]"
        flag = "--" + name.replace("_", "-")
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else None
        if get_origin(info.annotation) is tuple:
            parser.add_argument(
                flag, action="append", default=argparse.SUPPRESS, help=text, metavar=_metavar(name, None)
            )
        elif info.annotation is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                flag,
                *_OTHER_SPELLINGS.get(name, ()),
                default=argparse.SUPPRESS,
                choices=choices,
                help=text,
                metavar=_metavar(name, choices),
            )


def read_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    platform: Mapping[str, tuple[str, Any]] = MappingProxyType({}),
) -> Settings:
    """The settings: `flags` first, then variables, then `file`, then those of `platform`, then the defaults.

    `platform` has the values that a platform implies, each with where they come from. Raises ConfigError,
    which names the setting and its source.
    """
    merged = {name: value for name, (_, value) in platform.items()}
    origin = {name: source for name, (source, _) in platform.items()}
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
            said = fault["msg"].removeprefix("Value error, ")
            if not fault["loc"]:  # settings that do not fit together
                faults.append(said)
                continue
            name = str(fault["loc"][0])
            faults.append(f"{_spelled(origin[name], name)}: {said}, not {fault['input']!r}")
        raise ConfigError("; ".join(faults)) from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in environ.items():
        name = variable.removeprefix(ENV_PREFIX)
        if name == variable or name in _NOT_SETTINGS or _is_service_link(name, text):
            continue
        values[name.lower()] = _parsed(name.lower(), text)
    return values


def service_links(environ: Mapping[str, str]) -> list[str]:
    """The variables with our prefix that are no settings, because Kubernetes has set them for a Service."""
    return sorted(
        variable
        for variable, text in environ.items()
        if variable.startswith(ENV_PREFIX) and _is_service_link(variable.removeprefix(ENV_PREFIX), text)
    )


def _is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes has set a variable, whose name without our prefix is `name`, for a Service."""
    if name.lower() in Settings.model_fields:
        return name == "PORT" and "://" in text
    return bool(_SERVICE_LINK.match(name)) or (bool(_SERVICE_PORT.match(name)) and "://" in text)


def _from_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error


def _parsed(name: str, value: Any) -> Any:
    """Split a text with commas into the tuple of a list setting; pydantic parses all other texts.

    A flag may be repeated: its texts are then a list.
    """
    info = Settings.model_fields.get(name)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        value = ",".join(value)
    if info is not None and get_origin(info.annotation) is tuple and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _unknown(source: str, name: str) -> str:
    near = difflib.get_close_matches(name, Settings.model_fields, 1)
    hint = f"; did you mean {_spelled(source, near[0])}?" if near else ""
    return f"{_spelled(source, name)}: no setting has this name{hint}"


def _spelled(source: str, name: str) -> str:
    if source == "environment":
        return ENV_PREFIX + name.upper()
    return "--" + name.replace("_", "-") if source == "flag" else f"{source}: {name}"


def _default_text(default: Any) -> str:
    if default is None or default in ((), ""):
        return "none"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, tuple):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


_METAVARS: Final = {
    "connections_per_address": "N",
    "engines_per_device": "N",
    "load_from": "PREFIXES",
    "image_urls": "HOSTS",
}
"""What `--help` calls a value, if the last word of the setting's name says something else."""


def _metavar(name: str, choices: Sequence[str] | None) -> str | None:
    return None if choices else _METAVARS.get(name, name.rsplit("_", 1)[-1].upper())
