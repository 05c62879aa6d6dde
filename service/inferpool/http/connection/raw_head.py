"""The head of a request as bytes: its target, its size, and a head that the parser does not take as it is."""

from __future__ import annotations

from typing import Any, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

_LINE_BYTES: Final = 4
"""Bytes of a header beside its name and value: a colon, a space and the end of the line."""
_MOST_HEADS: Final = 32
"""Heads that are looked at to find the one at fault."""


def own_target(target: bytes, root_path: bytes) -> bytes:
    """Return a request's target without the path below which a proxy offers the server, and a last slash.

    So all routes of all APIs answer a path with a slash at its end as they answer the path without one. Only
    the page /docs redirects: its links are relative.
    """
    path, mark, query = target.partition(b"?")
    if not path.startswith(b"/"):
        return target
    if root_path and path.startswith(root_path) and path[len(root_path) :][:1] in (b"/", b""):
        path = path[len(root_path) :] or b"/"
    if path.endswith(b"/") and path not in (b"/", b"/docs/"):
        path = path[:-1]
    return path + mark + query


def head_bytes(parser: Any, url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    """Return the bytes of the request line and the headers, however they were received."""
    fields = sum(len(name) + len(value) + _LINE_BYTES for name, value in headers)
    return len(parser.get_method()) + len(url) + len(b"  HTTP/1.1\r\n\r\n") + fields


def head_without_upgrade(parser: Any, url: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the head that `parser` has read, without the fields that ask for another protocol."""
    lines = [b"%b %b HTTP/%b" % (parser.get_method(), url, parser.get_http_version().encode())]
    for name, value in headers:
        if name == b"connection":
            options = [option.strip() for option in value.split(b",")]
            value = b", ".join(option for option in options if option.lower() != b"upgrade")
        if name != b"upgrade":
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join((*lines, b"", b""))


def malformed_head(data: bytes, line: bytes) -> bytes:
    """Return the first head in `data` that begins with `line` and that the parser does not take.

    Empty if it is not found soon.
    """
    end = 0
    for _ in range(_MOST_HEADS):
        start = data.find(line, end)
        if start < 0:
            return b""
        end = data.find(b"\r\n\r\n", start) + 4
        head = data[start:end] if end > 3 else data[start:]
        try:
            HttpRequestParser(object()).feed_data(head)
        except HttpParserUpgrade:
            pass
        except HttpParserError:
            return head
        if end <= 3:
            return b""
    return b""
