"""Heads that the parser takes and HTTP does not allow."""

from __future__ import annotations

import pytest
from inferpool.errors import MalformedRequest, UnsupportedTransferCoding
from inferpool.http.connection.head_fault import HeadChecker


@pytest.mark.parametrize(
    "host",
    [
        "",
        "x",
        "inferpool.example:8000",
        "a_b",
        "127.0.0.1",
        "[::1]:80",
        "[v1.x:y]",
        "x:",
        "%41~",
        "x \t",
        "a" * 300,
    ],
)
def test_hosts_of_urls_are_taken(host: str) -> None:
    checker = HeadChecker()
    for _ in range(2):
        assert checker.fault([(b"accept", b"*/*"), (b"host", host.encode())], "1.1") is None


@pytest.mark.parametrize(
    "host", ["a b", "a,\tb", "x/y", "user@x", "x:y", "x:1:2", "::1", "[::1", "[x]", "\u00e9", "%4", "<x>"]
)
def test_other_hosts_are_refused_each_time(host: str) -> None:
    checker = HeadChecker()
    for version in ("1.1", "1.0"):
        fault = checker.fault([(b"host", host.encode())], version)
        assert isinstance(fault, MalformedRequest)
        assert "expected a name or an address" in fault.detail


def test_http_1_1_needs_one_host_and_http_1_0_may_have_one() -> None:
    checker = HeadChecker()
    assert checker.fault([], "1.0") is None
    assert isinstance(checker.fault([], "1.1"), MalformedRequest)
    for version in ("1.0", "1.1"):
        fault = checker.fault([(b"host", b"x"), (b"host", b"x")], version)
        assert isinstance(fault, MalformedRequest)
        assert "2 Host headers" in fault.detail


def test_the_hosts_that_are_remembered_are_bounded() -> None:
    checker = HeadChecker()
    for number in range(1000):
        assert checker.fault([(b"host", b"host-%d" % number)], "1.1") is None
        assert len(checker._hosts) <= 64


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["chunked"], None), (["CHUNKED"], None), ([" ,chunked, "], None), (["", "chunked"], None),
        (["gzip, chunked"], UnsupportedTransferCoding), (["gzip", "chunked"], UnsupportedTransferCoding),
        (["gzip;q=1, chunked"], UnsupportedTransferCoding),
        (["identity, chunked"], UnsupportedTransferCoding),
        (["chunked, chunked"], MalformedRequest), (["chunked", "chunked"], MalformedRequest),
        (["chunked, gzip"], MalformedRequest), (["chunked", "gzip"], MalformedRequest),
        (["gzip"], MalformedRequest), (["identity"], MalformedRequest), (["chunked;a=b"], MalformedRequest),
        ([""], MalformedRequest), (["xchunked"], MalformedRequest),
    ],
)  # fmt: skip
def test_a_body_is_chunked_and_nothing_else(fields: list[str], expected: type[Exception] | None) -> None:
    headers = [(b"host", b"x"), *((b"transfer-encoding", field.encode()) for field in fields)]
    fault = HeadChecker().fault(headers, "1.1")
    assert type(fault) is (type(None) if expected is None else expected)
    assert isinstance(HeadChecker().fault(headers, "1.0"), MalformedRequest)


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_versions_of_http_that_are_not_spoken_are_refused(version: str) -> None:
    assert isinstance(HeadChecker().fault([(b"host", b"x")], version), MalformedRequest)
