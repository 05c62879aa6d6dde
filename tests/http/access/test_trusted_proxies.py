"""Whose request it is behind proxies: only what a trusted proxy says counts."""

from __future__ import annotations

import logging

import pytest
from inferpool.errors import ConfigError, Unauthorized
from inferpool.http.access.caller import PREDICT
from inferpool.http.access.gate import Gate
from inferpool.http.access.refusals import Refusals
from inferpool.http.access.trusted_proxies import TrustedProxies, make_proxies
from inferpool.observe.metrics import Metrics
from inferpool.settings_sources import read_settings

PROXIES = TrustedProxies(["10.0.0.0/8", "2001:db8::/32"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", b"203.0.113.7", "203.0.113.7"),
        ("203.0.113.1", b"198.51.100.1", "203.0.113.1"),  # nobody believes a stranger
        ("", b"198.51.100.1", ""),
        ("10.0.0.1", b"6.6.6.6, 203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", b"203.0.113.7, 10.0.0.2", "203.0.113.7"),
        ("10.0.0.1", b"10.0.0.3,10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", b"203.0.113.7:4711", "203.0.113.7"),
        ("10.0.0.1", b"[2001:db9::1]:4711", "2001:db9::1"),
        ("10.0.0.1", b"2001:DB9::0:1", "2001:db9::1"),
        ("2001:db8::5", b"203.0.113.7", "203.0.113.7"),
        ("::ffff:10.0.0.1", b"203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", b"unknown", "10.0.0.1"),
        ("10.0.0.1", b"203.0.113.7, nonsense\x1b[31m", "10.0.0.1"),
        ("10.0.0.1", b"", "10.0.0.1"),
        ("10.0.0.1", b"10.0.0.2," * 5000, "10.0.0.1"),
        ("10.0.0.1", b"6.6.6.6," + b"10.0.0.2," * 5000 + b"10.0.0.2", "10.0.0.2"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_proxy(
    peer: str, forwarded: bytes | None, client: str
) -> None:
    assert PROXIES.client(peer, forwarded) == client


def test_whoever_uses_a_unix_socket_may_be_trusted() -> None:
    assert TrustedProxies(["unix"]).client("", b"203.0.113.7") == "203.0.113.7"


def test_the_setting_is_checked() -> None:
    assert make_proxies(read_settings({}, {}).trusted_proxies) is None
    assert read_settings({"trusted_proxies": "10.0.0.0/8, unix"}, {}).trusted_proxies == (
        "10.0.0.0/8",
        "unix",
    )
    for wrong in ("10.0.0.1/8", "proxy.example.com"):
        with pytest.raises(ConfigError, match=r"--trusted-proxies: .*; write an address, a network or unix"):
            read_settings({"trusted_proxies": wrong}, {})


def test_refused_keys_are_counted_by_the_client_behind_the_proxy(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals(Metrics({}), lambda: 0.0)
    gate = Gate(lambda: 0.0, enabled=True, refusals=refusals, proxies=PROXIES)
    headers = [(b"x-forwarded-for", b"6.6.6.6"), (b"x-forwarded-for", b"203.0.113.7")]
    with pytest.raises(Unauthorized), caplog.at_level(logging.WARNING):
        gate.authorize(headers, PREDICT, "m", "10.0.0.1")
    assert "a request of 203.0.113.7 was refused" in caplog.text
