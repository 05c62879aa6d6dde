"""Turns the outputs of a model of text into one vector for each text, or one score for each pair of texts.

`[text.embeddings]` and `[text.scores]` in a model.toml say how. Sums and means are computed for each row by
itself, so a vector does not depend on the other texts of its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from inferpool.codecs.text_config import TextConfig
from inferpool.errors import ConfigError, ModelFailed, Reason
from inferpool.tensors import (
    ANY,
    FLOATS,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    bf16_to_fp32,
    names_text,
    shape_text,
)

_USUAL: Final = "sentence_embedding"
"""The output of vectors in exports of sentence-transformers, which give the vectors of tokens, too."""


class VectorOutput:
    """Makes the vectors of texts.

    Attributes:
        output: the name of the model's output.
        pooled: whether the output has a vector for each token.
        width: how many numbers a vector has; None if only the output tells.
        dimensions: the sizes to which a vector may be cut.
        is_configured: whether model.toml says which output it is, or how it is pooled.
    """

    def __init__(self, config: TextConfig, spec: TensorSpec) -> None:
        """Make vectors of the output `spec`; raises ConfigError if model.toml does not fit it."""
        table = config.embeddings
        shape = spec.shape
        rank = len(shape) if shape is not None else 3 if table.pooling else 2
        if spec.datatype not in FLOATS or rank not in (2, 3):
            raise ConfigError(
                f'text.embeddings.output: "{spec.name}" is {spec.datatype} {shape_text(shape)}; it must be'
                " floating-point numbers, [rows, width] or [rows, tokens, width]"
            )
        if rank == 2 and table.pooling is not None:
            raise ConfigError(
                f'text.embeddings.pooling: "{spec.name}" is {shape_text(shape)}, one vector a row already;'
                " leave out the key, or name an output with tokens in text.embeddings.output"
            )
        if rank == 3 and table.pooling is None:
            raise ConfigError(
                f'text.embeddings.pooling: "{spec.name}" has a vector for each token; say how they become'
                ' one: "mean", "cls" or "last"'
            )
        self.output: Final = spec.name
        self.pooled: Final = rank == 3
        self.width: Final = None if shape is None or shape[-1] == ANY else shape[-1]
        self.dimensions: Final = table.dimensions
        self.is_configured: Final = table.output is not None or table.pooling is not None
        if self.width is not None and any(size > self.width for size in table.dimensions):
            raise ConfigError(
                f'text.embeddings.dimensions: "{spec.name}" has vectors of {self.width} numbers; none can be'
                f" cut to {max(table.dimensions)}"
            )
        self._pooling = table.pooling
        self._normalize = table.normalize
        self._is_bf16 = spec.datatype == "BF16"

    def vectors(
        self, outputs: Tensors, lengths: Sequence[int], size: int | None = None, *, unit: bool = False
    ) -> Array:
        """Return the vectors `[rows, width]` as FP32, from the outputs for texts of `lengths` tokens.

        They are cut to `size` numbers, and have the length 1 if model.toml says so, or if `unit` is set.
        Raises ModelFailed if the output has another shape than the model states, or numbers that are not
        finite.
        """
        tensor = outputs[self.output]
        rank = 3 if self.pooled else 2
        if tensor.ndim != rank or len(tensor) != len(lengths) or tensor.shape[-1] < (size or 1):
            raise ModelFailed(
                f'output "{self.output}" has shape {shape_text(tensor.shape)} for {len(lengths)} texts'
            )
        if self.pooled and tensor.shape[1] < max(lengths):
            raise ModelFailed(
                f'output "{self.output}" has shape {shape_text(tensor.shape)} for {max(lengths)} tokens'
            )
        numbers = bf16_to_fp32(tensor) if self._is_bf16 else tensor
        if self.pooled:
            numbers = self._pool(numbers, np.array(lengths))
        vectors: Array = numbers[:, :size].astype(np.float32)
        if not np.isfinite(vectors).all():
            raise ModelFailed(f'output "{self.output}" has numbers that are not finite')
        if self._normalize or unit:
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            vectors = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
        return vectors

    def _pool(self, tokens: Array, lengths: Array) -> Array:
        if self._pooling != "mean":
            positions = lengths - 1 if self._pooling == "last" else np.zeros_like(lengths)
            one_each: Array = tokens[np.arange(len(tokens)), positions]
            return one_each
        pooled = np.empty((len(tokens), tokens.shape[2]), np.float32)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            pooled[rows] = tokens[rows, :length].mean(axis=1, dtype=np.float32)
        return pooled


class ScoreOutput:
    """Makes the scores of pairs of texts.

    Attributes:
        output: the name of the model's output.
    """

    def __init__(self, config: TextConfig, spec: TensorSpec) -> None:
        """Make scores of the output `spec`; raises ConfigError if it has not one number a row."""
        if not _is_score(spec):
            raise ConfigError(
                f'text.scores.output: "{spec.name}" is {spec.datatype} {shape_text(spec.shape)}; it must be'
                " one floating-point number a row: [rows] or [rows, 1]"
            )
        self.output: Final = spec.name
        self._is_bf16 = spec.datatype == "BF16"
        self._activation = config.scores.activation

    def scores(self, outputs: Tensors, count: int) -> Array:
        """Return the scores of `count` pairs as FP32.

        Raises ModelFailed if the output has not one number a pair, or numbers that are not finite.
        """
        tensor = outputs[self.output]
        if tensor.shape not in ((count,), (count, 1)):
            raise ModelFailed(
                f'output "{self.output}" has shape {shape_text(tensor.shape)} for {count} pairs'
            )
        numbers = (bf16_to_fp32(tensor) if self._is_bf16 else tensor).reshape(count).astype(np.float64)
        if not np.isfinite(numbers).all():
            raise ModelFailed(f'output "{self.output}" has numbers that are not finite')
        if self._activation == "sigmoid":
            numbers = 0.5 * (1 + np.tanh(0.5 * numbers))  # exp overflows for large negative numbers
        scores: Array = numbers.astype(np.float32)
        return scores


def find_vectors(config: TextConfig, signature: Signature) -> VectorOutput | Reason:
    """Return what makes vectors of the model's outputs, or why nothing does.

    Raises ConfigError if model.toml says how, but not as the model is.
    """
    table = config.embeddings
    is_configured = bool(table.model_fields_set)
    if config.pairs:
        if is_configured and table.model_fields_set - {"query_prefix", "document_prefix"}:
            raise ConfigError("text.embeddings: a model of pairs gives scores; leave out the table")
        return "the model takes pairs of texts (text.pairs)"
    if table.output is not None:
        return VectorOutput(config, _named("embeddings", table.output, signature))
    floats = [spec for spec in signature.outputs if spec.datatype in FLOATS and spec.shape is not None]
    whole = [spec for spec in floats if len(spec.shape or ()) == 2 and (spec.shape or (0,))[-1] != 1]
    tokens = [spec for spec in floats if len(spec.shape or ()) == 3]
    if table.pooling is not None:
        found = tokens if tokens else whole
    else:
        usual = [spec for spec in whole if spec.name == _USUAL]
        found = usual or ([] if tokens else whole)
    if len(found) == 1:
        return VectorOutput(config, found[0])
    reason = (
        f"the model gives {names_text(signature.outputs_by_name)}; name the output with vectors in"
        " text.embeddings.output of its model.toml, and how those of tokens become one in"
        " text.embeddings.pooling"
    )
    if is_configured:
        raise ConfigError(f"text.embeddings: {reason}")
    return reason


def find_scores(config: TextConfig, signature: Signature) -> ScoreOutput | Reason:
    """Return what makes scores of the model's outputs, or why nothing does.

    Raises ConfigError if model.toml says how, but not as the model is.
    """
    table = config.scores
    if not config.pairs:
        if table.model_fields_set:
            raise ConfigError("text.scores: the model takes single texts; set text.pairs = true for pairs")
        return "the model takes single texts (text.pairs is not set)"
    if table.output is not None:
        return ScoreOutput(config, _named("scores", table.output, signature))
    found = [spec for spec in signature.outputs if _is_score(spec)]
    if len(found) == 1:
        return ScoreOutput(config, found[0])
    reason = (
        f"the model gives {names_text(signature.outputs_by_name)}; name the output with one score a pair in"
        " text.scores.output of its model.toml"
    )
    if table.model_fields_set:
        raise ConfigError(f"text.scores: {reason}")
    return reason


def _is_score(spec: TensorSpec) -> bool:
    shape = spec.shape
    return spec.datatype in FLOATS and shape is not None and (len(shape) == 1 or shape[1:] == (1,))


def _named(table: str, name: str, signature: Signature) -> TensorSpec:
    spec = signature.outputs_by_name.get(name)
    if spec is None:
        raise ConfigError(
            f'text.{table}.output: no output is called "{name}"; the model gives'
            f" {names_text(signature.outputs_by_name)}"
        )
    return spec
