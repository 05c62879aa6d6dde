"""Where the models are, and which settings follow from a platform: rules on a file system of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.errors import ConfigError
from inferpool.platforms import MOUNT_WAIT_S, Location, find_repository, platform_settings
from inferpool.settings_sources import read_settings

ALL = {
    "INFERPOOL_REPOSITORY": "/named",
    "AIP_STORAGE_URI": "file:///vertex/my%20model",
    "AZUREML_MODEL_DIR": "/var/azureml-app/azureml-models/m/1",
}


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_the_places_have_an_order(tmp_path: Path) -> None:
    """Each place is taken if all that come before it are missing."""
    folders(tmp_path, "opt/ml/model", "mnt/models", "models")
    environ = dict(ALL)
    found = []

    def find(argument: Path | None = None) -> str:
        return find_repository(argument, environ, tmp_path).text.removeprefix(str(tmp_path))

    found.append(find(Path("argument")))
    found.append(find())
    del environ["INFERPOOL_REPOSITORY"]
    found.append(find())
    (tmp_path / "opt/ml/model").rmdir()
    found.append(find())
    environ["AIP_STORAGE_URI"] = "gs://bucket/model"
    found.append(find())
    del environ["AIP_STORAGE_URI"]
    found.append(find())
    del environ["AZUREML_MODEL_DIR"]
    found.append(find())
    (tmp_path / "mnt/models").rmdir()
    found.append(find())
    assert found == [
        *("argument", "/named", "/opt/ml/model", "/vertex/my model", "gs://bucket/model"),
        *("/var/azureml-app/azureml-models/m/1", "/mnt/models", "/models"),
    ]
    (tmp_path / "models").rmdir()
    with pytest.raises(ConfigError, match="REPOSITORY is missing"):
        find()


def test_a_mount_of_kserve_may_come_late(tmp_path: Path) -> None:
    """A link to nowhere counts as the mount, and so does the variable of images with models."""
    folders(tmp_path, "mnt", "models")
    assert not find_repository(None, {}, tmp_path).is_mount
    asynchronous = find_repository(None, {"MODEL_INIT_MODE": "async"}, tmp_path)
    (tmp_path / "mnt/models").symlink_to("/proc/0/root/models")
    for location in (asynchronous, find_repository(None, {}, tmp_path)):
        assert location.text == str(tmp_path / "mnt/models")
        assert platform_settings(location, {})["repository_wait_s"][1] == MOUNT_WAIT_S
    named = find_repository(Path("/mnt/models"), {}, tmp_path)
    assert platform_settings(named, {})["repository_wait_s"] == ("/mnt/models", MOUNT_WAIT_S)
    assert platform_settings(find_repository(Path("/mistyped"), {}, tmp_path), {}) == {}


def test_the_variables_of_ports_have_an_order(tmp_path: Path) -> None:
    folders(tmp_path, "opt/ml/model")
    sagemaker = find_repository(None, {}, tmp_path)
    elsewhere = Location("/models", "", False)
    environ = {"SAGEMAKER_BIND_TO_PORT": "1", "AIP_HTTP_PORT": "2", "PORT": "3"}
    for variable in list(environ):
        assert platform_settings(sagemaker, environ)["port"] == (variable, environ[variable])
        del environ[variable]
    assert platform_settings(sagemaker, {})["port"][1] == 8080
    assert "port" not in platform_settings(elsewhere, {"PORT": "tcp://10.0.0.1:80"})


def test_what_the_user_has_chosen_is_stronger(tmp_path: Path) -> None:
    """Flags, variables and the file override a platform, and the platform the defaults."""
    platform = platform_settings(
        Location("/models", "", False),
        {"PORT": "80", "AIP_PREDICT_ROUTE": "/p", "AIP_HEALTH_ROUTE": "/h/"},
    )
    file = tmp_path / "settings.toml"
    file.write_text("port = 3\n")
    assert read_settings({"port": "1"}, {"INFERPOOL_PORT": "2"}, file, platform).port == 1
    assert read_settings({}, {"INFERPOOL_PORT": "2"}, file, platform).port == 2
    assert read_settings({}, {}, file, platform).port == 3
    settings = read_settings({}, {"INFERPOOL_REPOSITORY": "/x"}, None, platform)
    assert (settings.port, settings.predict_route, settings.health_route) == (80, "/p", "/h")


def test_a_wrong_value_of_a_platform_is_named() -> None:
    platform = platform_settings(Location("/models", "", False), {"PORT": "eighty"})
    with pytest.raises(ConfigError, match=r"PORT: port: .*'eighty'"):
        read_settings({}, {}, None, platform)
