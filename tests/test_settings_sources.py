"""Settings: which source wins, and what the errors name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from inferpool.errors import ConfigError
from inferpool.settings_sources import read_settings, service_links


def test_flags_override_variables_which_override_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 1\nqueue_ms = 2.0\nthreads = 3\n")
    environ = {"INFERPOOL_PORT": "4", "INFERPOOL_QUEUE_MS": "5", "PATH": "/bin"}
    settings = read_settings({"port": "6"}, environ, file)
    assert (settings.port, settings.queue_ms, settings.threads) == (6, 5.0, 3)
    assert settings.host == "127.0.0.1"


def test_a_list_is_separated_by_commas() -> None:
    assert read_settings({"required_models": "a, b,,c"}, {}).required_models == ("a", "b", "c")


def test_variables_that_kubernetes_sets_for_a_service_are_ignored() -> None:
    environ = {
        "INFERPOOL_SERVICE_HOST": "10.0.0.1",
        "INFERPOOL_SERVICE_PORT_HTTP": "8000",
        "INFERPOOL_PORT": "tcp://10.0.0.1:8000",
        "INFERPOOL_PORT_8000_TCP_ADDR": "10.0.0.1",
        # Of Services that are called inferpool-web and inferpool-web-processes.
        "INFERPOOL_WEB_SERVICE_HOST": "fd00::1",
        "INFERPOOL_WEB_SERVICE_PORT": "80",
        "INFERPOOL_WEB_SERVICE_PORT_HTTP": "80",
        "INFERPOOL_WEB_PORT": "tcp://[fd00::1]:80",
        "INFERPOOL_WEB_PORT_80_TCP": "tcp://[fd00::1]:80",
        "INFERPOOL_WEB_PROCESSES_PORT_53_UDP_PROTO": "udp",
    }
    assert read_settings({}, environ) == read_settings({}, {})
    assert service_links({**environ, "INFERPOOL_QUEUE_MS": "5", "WEB_PORT": "tcp://x"}) == sorted(environ)
    assert read_settings({}, {"INFERPOOL_PORT": "80"}).port == 80
    with pytest.raises(ConfigError, match="INFERPOOL_WEB_PORT: no setting has this name"):
        read_settings({}, {"INFERPOOL_WEB_PORT": "80"})


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"port": "70000"}, {}, r"^--port: Input should be less than or equal to 65535, not '70000'$"),
        ({}, {"INFERPOOL_PORT": "x"}, "^INFERPOOL_PORT: Input should be a valid integer"),
        ({"devices": "cuda"}, {}, "^--devices: "),
        (
            {},
            {"INFERPOOL_QUEUE_MSEC": "1"},
            r"^INFERPOOL_QUEUE_MSEC: no setting has this name; did you mean INFERPOOL_QUEUE_MS\?$",
        ),
        ({}, {"INFERPOOL_XYZZY": "1"}, "^INFERPOOL_XYZZY: no setting has this name$"),
    ],
)
def test_an_error_names_the_setting_as_its_source_spells_it(
    flags: Mapping[str, str], environ: Mapping[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(flags, environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [("prot = 1\n", "prot: no setting has this name; did you mean .*port"), ("port = \n", "settings.toml: ")],
)
def test_an_error_in_the_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_settings({}, {}, file)
    assert str(file) in refused.value.detail


def test_a_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        read_settings({}, {}, tmp_path / "none.toml")
