"""Bodies of `/v1/embeddings`, `/v1/rerank` and `/v1/score`: what they ask for, and their answers.

Answers are written in pieces, as `json_pieces` does. This module is not compiled: its loops over texts let
other threads run.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np

from inferpool.codecs.text import Rows, TextCodec, TextRows
from inferpool.codecs.text_outputs import ScoreOutput, VectorOutput
from inferpool.errors import InvalidInput
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Array, Tensors, name_text, names_text
from inferpool.wire.json_bodies import unknown_field, whole_number, write, wrong_field

_COMMON: Final = ("model", "version", "truncate", "truncation", "user")
_PIECE_ITEMS: Final = 64
"""Vectors or scores that are written at a time."""
_SHOWN_TEXTS: Final = 20
"""Texts that a warning names."""
_TRUNCATES: Final[Mapping[Any, bool]] = {True: True, False: False, "END": True, "NONE": False}
KINDS: Final[Mapping[str, str]] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
    "retrieval.passage": "document",
}
"""What a text is, in the words of several clients."""


class TextRequest(ABC):
    """A request for something that is made of texts.

    Attributes:
        model: the model's name, or None.
        version: a version number or label, or None.
        output: the model's output that is needed; known after `encode`.
        answers_json: whether the answer has all numbers of this output; known after `encode`.
    """

    known: ClassVar[tuple[str, ...]]

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Check the `fields` of a body; raises InvalidInput with the first that is wrong."""
        unknown = next((key for key in fields if key not in self.known), None)
        if unknown is not None:
            raise unknown_field("the body", "", unknown, self.known)
        self.model = _text(fields, "model")
        version = fields.get("version")
        self.version = None if version is None else str(_number_or_text(version))
        _text(fields, "user")
        self._truncate = _read_truncate(fields)
        self.output = ""
        self.answers_json = True
        self._rows = TextRows([], [], [])
        self._name = ""

    def encode(self, served: ServedVersion) -> Sequence[Rows]:
        """Return the rows of tokens for the version; call this once.

        Raises InvalidInput if the version's model cannot answer, or a text cannot be encoded, and
        BodyTooLarge if there are too many characters.
        """
        view = served.view
        self._name = view.key.model
        text = view.text
        if text is None:
            raise InvalidInput(
                f"model {name_text(self._name)} takes no text: its model.toml has no table [text]",
                field="model",
            )
        self._rows = self._encode(text, served)
        return self._rows.groups

    @abstractmethod
    def write(self, outputs: Tensors, request_id: str) -> Iterator[bytes]:
        """Yield the answer in pieces of JSON; raises ModelFailed if the outputs are none that fit."""

    @abstractmethod
    def _encode(self, text: TextCodec, served: ServedVersion) -> TextRows: ...

    def _vectors_of(self, text: TextCodec, served: ServedVersion) -> VectorOutput:
        """Return what makes the vectors; raises InvalidInput if nothing does."""
        found = text.vectors
        if isinstance(found, str) or (served.view.classes is not None and not found.is_configured):
            why = found if isinstance(found, str) else "it has labels, so its output is taken for scores"
            raise InvalidInput(
                f"model {name_text(self._name)} gives no vectors of texts: {why}", field="model"
            )
        self.output = found.output
        self.answers_json = not found.pooled
        return found

    @property
    def _tokens(self) -> int:
        return sum(self._rows.lengths)

    def _usage(self) -> dict[str, int]:
        return {"prompt_tokens": self._tokens, "total_tokens": self._tokens}

    def _warnings(self, text: TextCodec, called: str, indices: Sequence[int]) -> list[str]:
        """Return what the client should know about the answer."""
        if not indices:
            return []
        shown = ", ".join(map(str, indices[:_SHOWN_TEXTS])) + (", …" if len(indices) > _SHOWN_TEXTS else "")
        return [f"{called} {shown}: truncated to {text.max_tokens} tokens"]


class EmbeddingsRequest(TextRequest):
    """A request for the vectors of texts, as OpenAI has it."""

    known = (*_COMMON, "input", "encoding_format", "dimensions", "input_type", "task")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Check the `fields` of a body; raises InvalidInput with the first that is wrong."""
        super().__init__(fields)
        self._texts, self._ids = _read_input(fields.get("input"))
        self._is_base64 = _choice(fields, "encoding_format", ("float", "base64")) == "base64"
        self._kind = _choice(fields, "input_type", tuple(KINDS)) or _choice(fields, "task", tuple(KINDS))
        size = fields.get("dimensions")
        number = None if size is None else whole_number(size)
        if size is not None and (number is None or number < 1):
            raise wrong_field("dimensions", size, "a whole number from 1")
        self._size = number
        self._text: TextCodec | None = None

    def _encode(self, text: TextCodec, served: ServedVersion) -> TextRows:
        vectors = self._vectors_of(text, served)
        self._text = text
        if self._size is not None and self._size != vectors.width and self._size not in vectors.dimensions:
            sizes = sorted({*vectors.dimensions, *([vectors.width] if vectors.width else [])})
            raise InvalidInput(
                f'"dimensions" is {self._size}; model {name_text(self._name)} gives'
                f" {' or '.join(map(str, sizes)) or 'vectors of one size'}"
                " (text.embeddings.dimensions in its model.toml)",
                field="dimensions",
                expected=sizes,
                got=self._size,
            )
        apart = not served.view.batching.enabled
        if self._ids is not None:
            return text.rows_of_tokens(self._ids, "input", apart=apart)
        prefix = ""
        if self._kind is not None:
            prefix = text.query_prefix if KINDS[self._kind] == "query" else text.document_prefix
        texts = [prefix + each for each in self._texts] if prefix else self._texts
        return text.encode_texts(texts, "input", apart=apart, truncate=self._truncate)

    def write(self, outputs: Tensors, request_id: str) -> Iterator[bytes]:
        """Yield OpenAI's list of vectors."""
        text = self._text
        assert text is not None  # `encode` found it
        made = text.vectors
        assert not isinstance(made, str)
        vectors = made.vectors(outputs, self._rows.lengths, self._size)
        yield b'{"object":"list","data":['
        for start in range(0, len(vectors), _PIECE_ITEMS):
            items = [
                {"object": "embedding", "index": index, "embedding": self._vector(vectors[index])}
                for index in range(start, min(start + _PIECE_ITEMS, len(vectors)))
            ]
            yield (b"," if start else b"") + write(items)[1:-1]
        rest: dict[str, Any] = {"model": self._name, "usage": self._usage()}
        if self._rows.truncated:
            rest["truncated"] = self._rows.truncated
            rest["warnings"] = self._warnings(text, "input", self._rows.truncated)
        yield b"]," + write(rest)[1:]

    def _vector(self, vector: Array) -> Any:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if self._is_base64 else vector


class PairsRequest(TextRequest):
    """A request for the scores of pairs of texts.

    A model of pairs gives them itself. Of a model that gives vectors, a score is the cosine of the angle
    between the vectors of the two texts.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._firsts: list[str] = []
        self._seconds: list[str] = []
        self._names = ("", "")
        self._truncated_firsts: list[int] = []
        self._text: TextCodec | None = None

    def _encode(self, text: TextCodec, served: ServedVersion) -> TextRows:
        self._text = text
        apart = not served.view.batching.enabled
        firsts = [text.query_prefix + each for each in self._firsts]
        seconds = [text.document_prefix + each for each in self._seconds]
        if text.pairs:
            scores = text.scores
            if isinstance(scores, str):
                raise InvalidInput(
                    f"model {name_text(self._name)} gives no scores of pairs: {scores}", field="model"
                )
            self.output = scores.output
            if len(firsts) == 1:
                firsts *= len(seconds)
            pairs = list(zip(firsts, seconds, strict=True))
            return text.encode_texts(pairs, self._names[1], apart=apart, truncate=self._truncate)
        self._vectors_of(text, served)
        self.answers_json = False
        one = text.encode_texts(firsts, self._names[0], apart=apart, truncate=self._truncate)
        two = text.encode_texts(seconds, self._names[1], apart=apart, truncate=self._truncate)
        self._truncated_firsts = one.truncated
        count = len(firsts)
        later = [Rows([count + index for index in rows.indices], rows.tensors) for rows in two.groups]
        return TextRows([*one.groups, *later], one.lengths + two.lengths, two.truncated)

    def _scores(self, outputs: Tensors) -> Array:
        text = self._text
        assert text is not None  # `encode` found it
        lengths = self._rows.lengths
        if isinstance(text.scores, ScoreOutput):
            return text.scores.scores(outputs, len(lengths))
        assert not isinstance(text.vectors, str)
        vectors = text.vectors.vectors(outputs, lengths, unit=True)
        count = len(self._firsts)
        scores: Array = np.clip((vectors[:count] * vectors[count:]).sum(axis=1), -1, 1)
        return scores

    def _notes(self) -> dict[str, Any]:
        """Return which texts, or pairs, were truncated, and what the client should know about it."""
        text = self._text
        assert text is not None  # `encode` found it
        truncated, firsts = self._rows.truncated, self._truncated_firsts
        if not truncated and not firsts:
            return {}
        first, second = self._names
        warnings = [*self._warnings(text, first, firsts), *self._warnings(text, second, truncated)]
        return {"truncated": truncated, "warnings": warnings}


class RerankRequest(PairsRequest):
    """A request for the scores of documents for a query, best first, as Cohere and Jina have it."""

    known = (*_COMMON, "query", "documents", "top_n", "return_documents")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Check the `fields` of a body; raises InvalidInput with the first that is wrong."""
        super().__init__(fields)
        self._firsts = [_one_text("query", fields.get("query"))]
        documents = fields.get("documents")
        if not isinstance(documents, list):
            raise wrong_field("documents", documents, "a list of texts")
        self._seconds = [_one_text(f"documents[{position}]", each) for position, each in enumerate(documents)]
        if not documents:
            raise InvalidInput('"documents" is empty: send at least one text', field="documents")
        self._names = ("query", "documents")
        top_n = fields.get("top_n")
        number = None if top_n is None else whole_number(top_n)
        if top_n is not None and (number is None or number < 1):
            raise wrong_field("top_n", top_n, "a whole number from 1")
        self._top_n = number
        self._returns_documents = _flag(fields, "return_documents")

    def write(self, outputs: Tensors, request_id: str) -> Iterator[bytes]:
        """Yield the results, best first, with the fields that Cohere and Jina have."""
        scores = self._scores(outputs)
        order = np.argsort(-scores, kind="stable")[: self._top_n].tolist()
        yield write({"id": request_id, "object": "list", "model": self._name})[:-1] + b',"results":['
        for start in range(0, len(order), _PIECE_ITEMS):
            items = [self._item(index, scores) for index in order[start : start + _PIECE_ITEMS]]
            yield (b"," if start else b"") + write(items)[1:-1]
        notes = self._notes()
        meta: dict[str, Any] = {"tokens": {"input_tokens": self._tokens}}
        if notes:
            meta["warnings"] = notes["warnings"]
        yield b"]," + write({"usage": self._usage(), "meta": meta, **notes})[1:]

    def _item(self, index: int, scores: Array) -> dict[str, Any]:
        item = {"index": index, "relevance_score": scores[index]}
        return {**item, "document": {"text": self._seconds[index]}} if self._returns_documents else item


class ScoreRequest(PairsRequest):
    """A request for the scores of pairs of texts, as vLLM has it."""

    known = (*_COMMON, "text_1", "text_2", "queries", "documents")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Check the `fields` of a body; raises InvalidInput with the first that is wrong."""
        super().__init__(fields)
        first, second = ("queries", "documents") if "queries" in fields else ("text_1", "text_2")
        other = next((key for key in self.known[-4:] if key in fields and key not in (first, second)), None)
        if other is not None:
            raise InvalidInput(
                f'the body has "{other}"; send either "text_1" and "text_2", or "queries" and "documents"',
                field=other,
            )
        self._firsts = _some_texts(first, fields.get(first))
        self._seconds = _some_texts(second, fields.get(second))
        if len(self._firsts) not in (1, len(self._seconds)):
            raise InvalidInput(
                f'"{first}" has {len(self._firsts)} texts and "{second}" {len(self._seconds)}; send one'
                f' "{first}" for all, or as many as "{second}"',
                field=first,
                expected=len(self._seconds),
                got=len(self._firsts),
            )
        self._names = (first, second)

    def write(self, outputs: Tensors, request_id: str) -> Iterator[bytes]:
        """Yield the scores in the order of the pairs."""
        scores = self._scores(outputs)
        yield write({"id": request_id, "object": "list", "model": self._name})[:-1] + b',"data":['
        for start in range(0, len(scores), _PIECE_ITEMS):
            items = [
                {"index": index, "object": "score", "score": scores[index]}
                for index in range(start, min(start + _PIECE_ITEMS, len(scores)))
            ]
            yield (b"," if start else b"") + write(items)[1:-1]
        yield b"]," + write({"usage": self._usage(), **self._notes()})[1:]


def _read_input(value: Any) -> tuple[list[str], list[list[int]] | None]:
    """Return the texts of `input`, or the token ids if it has those."""
    if isinstance(value, str):
        return [value], None
    if isinstance(value, dict):
        return [_one_text("input", value)], None
    if not isinstance(value, list):
        raise wrong_field("input", value, "a text, a list of texts, or token ids")
    if not value:
        raise InvalidInput('"input" is empty: send at least one text', field="input")
    if type(value[0]) is int:
        return [], [_token_ids("input", value)]
    if isinstance(value[0], list):
        return [], [_token_ids(f"input[{position}]", each) for position, each in enumerate(value)]
    return [_one_text(f"input[{position}]", each) for position, each in enumerate(value)], None


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise wrong_field(name, value, "a list of token ids, as the first item")
    for item in value:
        if type(item) is not int:
            raise wrong_field(name, item, "token ids, which are whole numbers", "holds")
    ids: list[int] = value
    return ids


def _some_texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        return [_one_text(name, value)]
    if not value:
        raise InvalidInput(f'"{name}" is empty: send at least one text', field=name)
    return [_one_text(f"{name}[{position}]", each) for position, each in enumerate(value)]


def _one_text(name: str, value: Any) -> str:
    """Return a text, or the one in `{"text": …}`."""
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise wrong_field(name, value, 'a text, or an object with "text"')
    return text


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong_field(name, value, "a string")
    return value


def _number_or_text(value: Any) -> int | str:
    number = whole_number(value)
    if number is None and not isinstance(value, str):
        raise wrong_field("version", value, "a whole number or a string")
    return value if number is None else number


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong_field(name, value, "true or false")
    return bool(value)


def _choice(fields: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str | None:
    value = fields.get(name)
    if value is not None and value not in choices:
        raise wrong_field(name, value, names_text(choices))
    found: str | None = value
    return found


def _read_truncate(fields: Mapping[str, Any]) -> bool:
    """Return whether texts that are too long may be truncated."""
    found = True
    for name in ("truncate", "truncation"):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, str)) or value not in _TRUNCATES:
            raise wrong_field(name, value, 'true, false, "END" or "NONE"')
        found = found and _TRUNCATES[value]
    return found
