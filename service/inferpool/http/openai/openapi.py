"""The routes of embeddings, rerank and scores in the OpenAPI document."""

from __future__ import annotations

from typing import Final

from inferpool.http.media_types import JSON_TYPE
from inferpool.http.openai.requests import KINDS
from inferpool.http.openapi_parts import ANSWER_HEADERS, REQUEST_HEADERS, Document, error_references

OPENAI_ERROR: Final[Document] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": "string", "description": "Stable; clients match it."},
            },
        }
    },
}
"""The form of errors that OpenAI's clients read."""

_STRING: Final[Document] = {"type": "string"}
_OBJECT: Final[Document] = {"type": "object", "required": ["text"], "properties": {"text": _STRING}}
_ONE: Final[Document] = {"anyOf": [_STRING, _OBJECT]}
_SEVERAL: Final[Document] = {"type": "array", "minItems": 1, "items": _ONE}
_IDS: Final[Document] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TRUNCATE: Final[Document] = {
    "enum": [True, False, "END", "NONE", None],
    "description": "Whether a text with more tokens than the model takes is truncated (the default), or"
    " refused.",
}
_COMMON: Final[Document] = {
    "model": {"type": ["string", "null"], "description": "May be left out if the server has one model."},
    "version": {"type": ["string", "integer", "null"], "description": "A number or a label."},
    "truncate": _TRUNCATE,
    "truncation": _TRUNCATE,
    "user": {"type": ["string", "null"], "description": "Not used."},
}
_COUNT: Final[Document] = {"type": "integer", "minimum": 0}
_KIND: Final[Document] = {
    "enum": [*KINDS, None],
    "description": "What the texts are: chooses the prefix that the model's configuration has for it.",
}
_NUMBER: Final[Document] = {"type": ["integer", "null"], "minimum": 1}
_USAGE: Final[Document] = {
    "type": "object",
    "properties": {"prompt_tokens": _COUNT, "total_tokens": _COUNT},
}
_NOTES: Final[Document] = {
    "usage": _USAGE,
    "truncated": {"type": "array", "items": _COUNT, "description": "Indices of texts that were truncated."},
    "warnings": {"type": "array", "items": _STRING},
}


def _body(required: list[str], **properties: Document) -> Document:
    return {
        "type": "object",
        "required": required,
        "properties": {**_COMMON, **properties},
        "additionalProperties": False,
    }


_EMBEDDINGS: Final = _body(
    ["input"],
    input={"anyOf": [_ONE, _SEVERAL, _IDS, {"type": "array", "minItems": 1, "items": _IDS}]},
    encoding_format={"enum": ["float", "base64", None]},
    dimensions={**_NUMBER, "description": "A size to which the model's configuration lets vectors be cut."},
    input_type=_KIND,
    task=_KIND,
)
_RERANK: Final = _body(
    ["query", "documents"],
    query=_ONE,
    documents=_SEVERAL,
    top_n=_NUMBER,
    return_documents={"type": ["boolean", "null"]},
)
_TEXTS: Final[Document] = {"anyOf": [_ONE, _SEVERAL]}
_SCORE: Final[Document] = {
    "anyOf": [
        _body(["text_1", "text_2"], text_1=_ONE, text_2=_TEXTS),
        _body(["queries", "documents"], queries=_ONE, documents=_TEXTS),
    ],
    "description": "One first text for all second texts, or as many.",
}
_VECTORS: Final[Document] = {
    "type": "object",
    "properties": {
        "object": {"const": "list"},
        "model": _STRING,
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "object": {"const": "embedding"},
                    "index": _COUNT,
                    "embedding": {
                        "anyOf": [{"type": "array", "items": {"type": "number"}}, _STRING],
                        "description": "Numbers, or little-endian FP32 in base64.",
                    },
                },
            },
        },
        **_NOTES,
    },
}
_RANKED: Final[Document] = {
    "type": "object",
    "properties": {
        "id": _STRING,
        "object": {"const": "list"},
        "model": _STRING,
        "results": {
            "type": "array",
            "description": "Best first.",
            "items": {
                "type": "object",
                "properties": {
                    "index": _COUNT,
                    "relevance_score": {"type": "number"},
                    "document": _OBJECT,
                },
            },
        },
        "meta": {"type": "object"},
        **_NOTES,
    },
}
_SCORES: Final[Document] = {
    "type": "object",
    "properties": {
        "id": _STRING,
        "object": {"const": "list"},
        "model": _STRING,
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "index": _COUNT,
                    "object": {"const": "score"},
                    "score": {"type": "number"},
                },
            },
        },
        **_NOTES,
    },
}


def text_paths() -> Document:
    """The path items of embeddings, rerank and scores."""
    ranks = "Order documents by their relevance for a query, as Cohere and Jina have it"
    return {
        "/v1/embeddings": _path("embeddings", "Vectors of texts, as OpenAI has it", _EMBEDDINGS, _VECTORS),
        "/v1/rerank": _path("rerank", ranks, _RERANK, _RANKED),
        "/v2/rerank": _path("rerank_v2", ranks, _RERANK, _RANKED),
        "/v1/score": _path("score", "Scores of pairs of texts", _SCORE, _SCORES),
    }


def _path(name: str, summary: str, request: Document, answer: Document) -> Document:
    return {
        "post": {
            "operationId": name,
            "tags": ["texts"],
            "summary": summary,
            "parameters": REQUEST_HEADERS,
            "requestBody": {"required": True, "content": {JSON_TYPE: {"schema": request}}},
            "responses": {
                "200": {
                    "description": "The answer.",
                    "headers": ANSWER_HEADERS,
                    "content": {JSON_TYPE: {"schema": answer}},
                },
                **error_references("OpenAiError"),
            },
        }
    }
