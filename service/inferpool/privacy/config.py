"""The table `[samples]` of a `model.toml`: what is kept of a share of the requests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from inferpool.errors import ConfigError
from inferpool.privacy.noise import LEAST_EPSILON, MOST_EPSILON
from inferpool.tensors import JSON, Signature, TensorSpec, name_text, names_text

_Table = ConfigDict(extra="forbid", frozen=True)
EVERY_NUMBER: Final = "*"
"""The name that stands for all inputs and outputs of numbers without a rule of their own."""
_COLUMN: Final = re.compile(r"(.+)\[([0-9]{1,6})\]")


class RoundRule(BaseModel):
    """Numbers are rounded to multiples of `round`."""

    model_config = _Table
    round: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NoiseRule(BaseModel):
    """Counts get noise: `epsilon`-differential privacy if one person changes a count by `sensitivity`."""

    model_config = _Table
    epsilon: Annotated[float, Field(ge=LEAST_EPSILON, le=MOST_EPSILON)]
    sensitivity: Annotated[int, Field(ge=1, le=1_000_000)] = 1


Rule: TypeAlias = Literal["keep", "drop", "hash"] | RoundRule | NoiseRule


class SamplesConfig(BaseModel):
    """`[samples]`: which requests are kept, encrypted, and which of their fields."""

    model_config = _Table
    share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Share of the requests of which samples are kept, chosen by a keyed hash of their ids."
        " Needs the settings `samples_dir` and `samples_keys_file`.",
    )
    fields: dict[str, Rule] = Field(
        default_factory=dict,
        max_length=256,
        description='Inputs and outputs that are kept, by name, and how: `"keep"`, `"hash"`, `"drop"`,'
        ' `{round = 10}` or `{epsilon = 1.0}`. `"name[3]"` is a column, `"*"` all other numbers but'
        " pixels and tokens. Other fields are not kept.",
    )
    max_rows: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=64, description="Rows of a request that are kept at most."
    )
    max_request_bytes: Annotated[int, Field(ge=1, le=2**20)] = Field(
        default=256 * 1024, description="A sample that would take more bytes is not kept."
    )


class FieldRules(NamedTuple):
    """How one input or output is kept: by `whole`, but its columns by `columns`."""

    whole: Rule
    columns: Mapping[int, Rule]


def kept_fields(config: SamplesConfig, signature: Signature, pixels: str | None, text: str | None,
                tokens: tuple[str, ...] = ()) -> dict[str, FieldRules]:  # fmt: skip
    """The rules of each input and output that is kept, by name.

    `pixels` is the input that takes pictures, `text` the one that takes sentences, and `tokens` those that
    get the tokens of sentences, which are never kept.

    Raises ConfigError for a name that the model does not have, or a rule that does not fit.
    """
    specs = {spec.name: spec for spec in _specs(signature)}
    personal = {name for name in (pixels, text) if name is not None}
    found: dict[str, dict[int | None, Rule]] = {}
    for key, rule in config.fields.items():
        if key == EVERY_NUMBER:
            continue
        name, column = _split(key, specs, text)
        if name in tokens and name != text:
            raise ConfigError(
                f"samples.fields: {name_text(name)} has the tokens of a text; name {name_text(text or '')} to"
                " keep the texts themselves"
            )
        if name in personal and (column is not None or not isinstance(rule, str)):
            raise ConfigError(
                f'samples.fields: {name_text(key)} has pixels or text: expected "keep", "hash" or "drop"'
            )
        _check(key, rule, specs.get(name))
        found.setdefault(name, {})[column] = rule
    every = config.fields.get(EVERY_NUMBER)
    for name, spec in specs.items():
        is_number = spec.datatype not in ("BYTES", JSON) and name not in personal and name not in tokens
        if every is not None and is_number:
            found.setdefault(name, {}).setdefault(None, every)
    return {
        name: FieldRules(rules.get(None, "drop"), {at: rule for at, rule in rules.items() if at is not None})
        for name, rules in found.items()
    }


def _specs(signature: Signature) -> Iterator[TensorSpec]:
    yield from signature.inputs
    yield from signature.outputs


def _split(key: str, specs: Mapping[str, TensorSpec], text: str | None) -> tuple[str, int | None]:
    if key in specs or key == text:
        return key, None
    match = _COLUMN.fullmatch(key)
    if match is not None and match[1] in specs:
        return match[1], int(match[2])
    raise ConfigError(
        f"samples.fields: the model has no {name_text(key)}; it has {names_text(specs)}, and columns of these"
        ' such as "name[0]"'
    )


def _check(key: str, rule: Rule, spec: TensorSpec | None) -> None:
    datatype = "BYTES" if spec is None else spec.datatype
    if datatype == JSON and rule != "drop":
        raise ConfigError(f"samples.fields: {name_text(key)} is JSON, of which no samples are kept")
    if isinstance(rule, RoundRule) and datatype in ("BYTES", "BOOL"):
        raise ConfigError(f"samples.fields: {name_text(key)} is {datatype}; only numbers can be rounded")
    if isinstance(rule, NoiseRule) and (datatype in ("BYTES", "BOOL") or datatype.startswith(("FP", "BF"))):
        raise ConfigError(
            f"samples.fields: {name_text(key)} is {datatype}; noise is for counts, which are integers"
        )
