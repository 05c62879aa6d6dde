"""Chooses the format of `/metrics` by the header Accept (RFC 9110, 12.5.1)."""

from __future__ import annotations

from typing import Final, NamedTuple

OPENMETRICS: Final = "application/openmetrics-text"
_TEXT: Final = "text/plain"
_VERSIONS: Final = {OPENMETRICS: ("1.0.0", "0.0.1"), _TEXT: ("0.0.4", "1.0.0")}
"""The versions that the server writes. A client that names no version gets the first."""
_ESCAPED_FROM: Final = "1.0.0"
"""The version from which a media type says how names are escaped."""
_ESCAPINGS: Final = ("underscores", "allow-utf-8", "dots", "values")
"""The ways to escape names. All names of the server are the same in each; the first is the usual one."""


class Exposition(NamedTuple):
    """A format, and the media type that names it to the client."""

    openmetrics: bool
    content_type: str


class _Choice(NamedTuple):
    kind: str
    parameters: dict[str, str]
    weight: float


def choose_exposition(accept: str) -> Exposition:
    """Return the format that a client wants most; of equal ones, the one that it names first.

    A client that accepts none of the formats gets the text format 0.0.4, as any Prometheus does.
    """
    best, most = _exposition(_TEXT, "", {}), 0.0
    for choice in map(_read, accept.lower().split(",")):
        kind = _TEXT if choice.kind in ("*/*", "text/*") else choice.kind
        kind = OPENMETRICS if kind == "application/*" else kind
        version = choice.parameters.get("version", "")
        if choice.weight > most and version in ("", *_VERSIONS.get(kind, ())) and kind in _VERSIONS:
            best, most = _exposition(kind, version, choice.parameters), choice.weight
    return best


def _exposition(kind: str, version: str, parameters: dict[str, str]) -> Exposition:
    version = version or _VERSIONS[kind][0]
    content_type = f"{kind}; version={version}; charset=utf-8"
    if version == _ESCAPED_FROM and "escaping" in parameters:
        wanted = parameters["escaping"]
        content_type += f"; escaping={wanted if wanted in _ESCAPINGS else _ESCAPINGS[0]}"
    return Exposition(kind == OPENMETRICS, content_type)


def _read(text: str) -> _Choice:
    kind, *fields = (field.strip() for field in text.split(";"))
    pairs = (field.partition("=") for field in fields)
    parameters = {name.strip(): value.strip().strip('"') for name, _, value in pairs}
    try:
        weight = float(parameters.get("q", "1"))
    except ValueError:
        weight = 0.0
    return _Choice(kind, parameters, weight if 0 < weight <= 1 else 0.0)
