"""The tests of pipelining and of large bodies, by way of TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.conftest import MakeChaos, Serve
from tests.http.connection.test_body_receiver import (
    test_a_large_body_waits_to_be_asked_for,
    test_a_large_compressed_body_is_read,
    test_a_large_invalid_body_is_refused_and_the_connection_stays_usable,
    test_requests_behind_a_large_body_are_answered_in_order,
)
from tests.http.connection.test_pipelining import (
    Wire,
    test_pipelined_requests_are_answered_in_order,
    test_requests_that_ask_to_upgrade_have_their_turns_as_all_others,
)
from tests.server import Server

__all__ = [
    "test_a_large_body_waits_to_be_asked_for",
    "test_a_large_compressed_body_is_read",
    "test_a_large_invalid_body_is_refused_and_the_connection_stays_usable",
    "test_pipelined_requests_are_answered_in_order",
    "test_requests_behind_a_large_body_are_answered_in_order",
    "test_requests_that_ask_to_upgrade_have_their_turns_as_all_others",
]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(
    authority: Authority,
    module_serve: Serve,
    module_make_chaos: MakeChaos,
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    folder: Path = tmp_path_factory.mktemp("tls")
    authority.issue(folder / "tls.crt", folder / "tls.key")
    files = ("--tls-certificate-file", str(folder / "tls.crt"), "--tls-key-file", str(folder / "tls.key"))
    return module_serve(module_make_chaos("m", run_ms=1), *files, "--max-body-bytes", str(8 * 2**20))


@pytest.fixture
def wire(server: Server, authority: Authority) -> Iterator[Wire]:
    with Wire(server, authority.client_context()) as made:
        yield made
