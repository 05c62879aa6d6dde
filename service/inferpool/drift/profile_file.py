"""The profile of a version: the shares of the values that its reference data has, field by field."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inferpool.errors import ConfigError
from inferpool.system.files import read_file

PROFILE_FILE: Final = "profile.json"
MOST_FIELDS: Final = 32
MOST_VALUES: Final = 20
"""Values of a category that are counted each; all others are counted together."""
BINS: Final = 10
"""Bins of numbers. Each has a tenth of the reference's numbers, unless many of them are equal."""
_MOST_BYTES: Final = 256 * 1024
_Table = ConfigDict(extra="forbid", frozen=True)
_Share = Annotated[float, Field(ge=0, le=1)]
_Edge = Annotated[float, Field(allow_inf_nan=False)]


class FieldProfile(BaseModel):
    """The reference of one field.

    Attributes:
        name: `inputs.NAME`, `outputs.NAME[3]`, `outputs.NAME.label` and so on; see `drift.fields`.
        kind: `number` or `category`.
        edges: of numbers, the upper ends of all bins but the last, which has no end.
        values: of categories, the values that are counted each.
        shares: for each bin or value, and then of all other values; for numbers these are missing ones.
    """

    model_config = _Table
    name: Annotated[str, Field(min_length=1, max_length=200)]
    kind: Literal["number", "category"]
    edges: Annotated[tuple[_Edge, ...], Field(max_length=BINS - 1)] = ()
    values: Annotated[tuple[Annotated[str, Field(max_length=200)], ...], Field(max_length=MOST_VALUES)] = ()
    shares: Annotated[tuple[_Share, ...], Field(min_length=1, max_length=MOST_VALUES + 1)]

    @model_validator(mode="after")
    def _parts_fit(self) -> FieldProfile:
        cells = len(self.edges) + 2 if self.kind == "number" else len(self.values) + 1
        if len(self.shares) != cells or not 0.98 < sum(self.shares) < 1.02:
            raise ValueError(f"{self.name} needs {cells} shares that add up to 1")
        if any(one >= other for one, other in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"the edges of {self.name} must rise")
        return self

    def tag(self) -> float:
        """A number for what is counted; counts with another one are those of another profile."""
        return float(zlib.crc32(repr((self.name, self.kind, self.edges, self.values)).encode()))


class Profile(BaseModel):
    """The reference of a version: its fields, how many rows it was made of, and of which data."""

    model_config = _Table
    form: Literal[1] = 1
    rows: Annotated[int, Field(ge=1)]
    data: Annotated[str, Field(max_length=200)] = ""
    fields: Annotated[tuple[FieldProfile, ...], Field(max_length=MOST_FIELDS)]

    @model_validator(mode="after")
    def _names_differ(self) -> Profile:
        if len({field.name for field in self.fields}) < len(self.fields):
            raise ValueError("two fields have the same name")
        return self

    def by_name(self) -> Mapping[str, FieldProfile]:
        """The fields by their names."""
        return {field.name: field for field in self.fields}


def read_profile(folder: Path) -> Profile | None:
    """The profile in a version's folder; None if there is none. Raises ConfigError if it is no profile."""
    name = f"{folder.name}/{PROFILE_FILE}"
    try:
        table = orjson.loads(read_file(folder / PROFILE_FILE, _MOST_BYTES))
        return Profile.model_validate(table)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON: {error}") from error


def profile_bytes(profile: Profile) -> bytes:
    """The content of a profile's file."""
    return orjson.dumps(profile.model_dump(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def check_series(series: Sequence[str], profile: Profile) -> None:
    """Raise ConfigError if `[drift] series` names a field that the profile does not have."""
    known = profile.by_name()
    unknown = next((name for name in series if name not in known), None)
    if unknown is not None:
        raise ConfigError(f'drift.series: the profile has no field "{unknown}"; it has {", ".join(known)}')
