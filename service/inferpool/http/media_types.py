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
FORM: Final = "multipart/form-data"
URL_ENCODED: Final = "application/x-www-form-urlencoded"

MEANT_AS_JSON: Final = frozenset(("", JSON_TYPE, URL_ENCODED, OCTET_STREAM))
"""Media types that are read as JSON: curl and browsers send some of them by default."""
