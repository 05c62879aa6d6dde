"""The format of `/metrics` is one that the server writes, and the one that the client wants most."""

from __future__ import annotations

import pytest
from inferpool.observe.exposition import choose_exposition

TEXT = "text/plain; version=0.0.4; charset=utf-8"
NEW_TEXT = "text/plain; version=1.0.0; charset=utf-8"
OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OLD_OPEN = "application/openmetrics-text; version=0.0.1; charset=utf-8"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", TEXT), ("*/*", TEXT), ("text/*", TEXT), ("application/json", TEXT),
        ("text/html,*/*;q=0.8", TEXT),
        ("text/plain", TEXT), ("text/plain;version=0.0.4", TEXT), ("text/plain;version=1.0.0", NEW_TEXT),
        ("text/plain;version=7", TEXT), ("application/*", OPEN),
        ("application/openmetrics-text", OPEN), ("APPLICATION/OpenMetrics-Text; Version=1.0.0", OPEN),
        ("application/openmetrics-text;version=0.0.1", OLD_OPEN),
        ('application/openmetrics-text; version="0.0.1"', OLD_OPEN),
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;version=9.9.9;x=\u00e9", TEXT),
        ("application/openmetrics-text;version=2.0.0,application/openmetrics-text;version=1.0.0;q=0.1", OPEN),
        ("application/openmetrics-text;q=0,text/plain;q=0.1", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
        ("application/openmetrics-text;q=x", TEXT), ("application/openmetrics-text;q=2", TEXT),
        ("text/plain;q=0.5,application/openmetrics-text;q=0.4", TEXT),
        ("text/plain;q=0.4,application/openmetrics-text;q=0.5", OPEN),
        ("text/plain,application/openmetrics-text", TEXT),
        ("application/openmetrics-text,text/plain", OPEN),
        ("application/openmetrics-text;version=1.0.0;escaping=dots", f"{OPEN}; escaping=dots"),
        ("application/openmetrics-text;version=1.0.0;escaping=x", f"{OPEN}; escaping=underscores"),
        ("application/openmetrics-text;version=0.0.1;escaping=dots", OLD_OPEN),
        ("text/plain;version=1.0.0;escaping=values", f"{NEW_TEXT}; escaping=values"),
        (PROMETHEUS_2, OPEN), (PROMETHEUS_3, f"{OPEN}; escaping=allow-utf-8"),
    ],
)  # fmt: skip
def test_the_client_gets_what_it_wants_most(accept: str, expected: str) -> None:
    found = choose_exposition(accept)
    assert found.content_type == expected
    assert found.openmetrics is ("openmetrics" in expected)
