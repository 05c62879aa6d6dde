"""The media types of request and response bodies, which the APIs have in common.

The codecs name those of pictures and text.
"""

from __future__ import annotations

from typing import Final

JSON_TYPE: Final = "application/json"
PROBLEM_JSON: Final = "application/problem+json"
NPY: Final = "application/x-npy"
NPZ: Final = "application/x-npz"
OCTET_STREAM: Final = "application/octet-stream"
CSV: Final = "text/csv"
JSON_LINES: Final = "application/jsonlines"
ARROW_STREAM: Final = "application/vnd.apache.arrow.stream"
ARROW_FILE: Final = "application/vnd.apache.arrow.file"
PARQUET: Final = "application/vnd.apache.parquet"
FORM: Final = "multipart/form-data"
URL_ENCODED: Final = "application/x-www-form-urlencoded"

TABLES: Final = (CSV, ARROW_STREAM, ARROW_FILE, PARQUET)
"""Files with a table."""

MEANT_AS_JSON: Final = frozenset(("", JSON_TYPE, URL_ENCODED, OCTET_STREAM))
"""Media types that are read as JSON: curl and browsers send some of them by default."""
