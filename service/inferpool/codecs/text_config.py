"""The table `[text]` of a model.toml, and the inputs of the model that it names."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from inferpool.errors import ConfigError
from inferpool.tensors import Signature, TensorSpec, names_text, shape_text

_IDS: Final = ("INT64", "INT32", "FP32")
"""Keras gives an input FP32 if its layer names no dtype, also that of an `Embedding`."""
_FLAGS: Final = ("INT64", "INT32", "BOOL", "FP32")


class EmbeddingsConfig(BaseModel):
    """The table `[text.embeddings]`: how an output becomes one vector for each text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="The output with the vectors, `[rows, width]`, or with one vector a token,"
        " `[rows, tokens, width]`.",
        json_schema_extra={"unset": "the only one, or `sentence_embedding`"},
    )
    pooling: Literal["mean", "cls", "last"] | None = Field(
        default=None,
        description="Turns the vectors of tokens into one: their mean, the first or the last token's.",
    )
    normalize: bool = Field(default=True, description="Scale every vector to the length 1.")
    dimensions: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=64)] = Field(
        default=(),
        description="Sizes to which a request may cut the vectors, for models that were trained for it"
        " (Matryoshka): `[64, 128]`.",
    )
    query_prefix: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="Put before a text that is sent as a query."
    )
    document_prefix: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="Put before a text that is sent as a document."
    )


class ScoresConfig(BaseModel):
    """The table `[text.scores]`: how an output becomes the score of a pair of texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="The output with one score a pair, `[rows]` or `[rows, 1]`.",
        json_schema_extra={"unset": "the only one"},
    )
    activation: Literal["sigmoid", "none"] = Field(
        default="sigmoid", description='Turns the output into the score: `"sigmoid"` or `"none"`.'
    )


class TextConfig(BaseModel):
    """The table `[text]` of a model.toml; the descriptions of its keys are also those of the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Annotated[str, Field(min_length=1)] = Field(
        default="text", description="The name under which clients send sentences."
    )
    tokenizer: Annotated[str, Field(min_length=1)] = Field(
        default="tokenizer.json", description="The tokenizer's file, of Hugging Face's `tokenizers`."
    )
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="Longer sentences are truncated to this many tokens.",
        json_schema_extra={
            "unset": "from the model if it takes one length, else from the tokenizer's file, else 512"
        },
    )
    pairs: bool = Field(
        default=False, description="A row is a pair of texts, `[first, second]`, as cross-encoders take it."
    )
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    scores: ScoresConfig = ScoresConfig()
    ids: str = Field(default="input_ids", description="The model's input of token ids, `[rows, tokens]`.")
    mask: str = Field(
        default="attention_mask",
        description="The model's input that is 1 for tokens and 0 for padding, if it has one.",
    )
    types: str = Field(
        default="token_type_ids", description="The model's input of token type ids, if it has one."
    )


def find_inputs(
    config: TextConfig, signature: Signature
) -> tuple[TensorSpec, TensorSpec | None, TensorSpec | None]:
    """Return the inputs for token ids, the mask and token type ids; None for those that the model lacks.

    Raises ConfigError if an input is missing or cannot hold tokens, or the model needs further inputs.
    """
    specs = signature.inputs_by_name
    if config.input in specs:
        raise ConfigError(f'text.input: the model already has an input called "{config.input}"')
    ids = _find_input("ids", config, signature, _IDS)
    if ids is None:
        raise ConfigError(f'text.ids: no input is called "{config.ids}"; the model takes {names_text(specs)}')
    mask = _find_input("mask", config, signature, _FLAGS)
    types = _find_input("types", config, signature, _IDS)
    given = {spec.name for spec in (ids, mask, types) if spec is not None}
    sizes = {spec.shape[1] for spec in (ids, mask, types) if spec is not None and spec.shape is not None}
    if len(sizes) > 1:
        raise ConfigError(f"text: {names_text(given)} differ in their number of tokens; they must be equal")
    missing = [spec.name for spec in signature.inputs if not spec.optional and spec.name not in given]
    if missing:
        raise ConfigError(f"text: the model also needs {names_text(missing)}, which sentences do not give")
    return ids, mask, types


def _find_input(
    key: str, config: TextConfig, signature: Signature, datatypes: tuple[str, ...]
) -> TensorSpec | None:
    name = getattr(config, key)
    spec = signature.inputs_by_name.get(name)
    if spec is None:
        if key in config.model_fields_set:
            raise ConfigError(
                f'text.{key}: no input is called "{name}"; the model takes'
                f" {names_text(signature.inputs_by_name)}"
            )
        return None
    if spec.datatype not in datatypes:
        raise ConfigError(f'text.{key}: "{name}" is {spec.datatype}; it must be {" or ".join(datatypes)}')
    if spec.shape is None or len(spec.shape) != 2 or spec.shape[1] == 0:
        raise ConfigError(f'text.{key}: "{name}" is {shape_text(spec.shape)}; it must be [rows, tokens]')
    return spec
