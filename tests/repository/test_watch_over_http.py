"""The models folder is watched: what appears, changes and vanishes there is served, exchanged and drained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.onnx_models import write_shift
from tests.server import Server, wait_until


@pytest.fixture(scope="module", params=["in-process", "process"])
def watched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_serve: Serve
) -> tuple[Path, Server]:
    """A server that watches its folder, in both modes. Each test uses a model of its own."""
    folder = tmp_path_factory.mktemp("watched")
    write_shift(folder, "first", 1, 1.0)
    return folder, module_serve(folder, "--watch", "--keep-warm-s", "0.2", "--engine", request.param)


@pytest.fixture
def folder(watched: tuple[Path, Server]) -> Path:
    return watched[0]


@pytest.fixture
def server(watched: tuple[Path, Server]) -> Server:
    return watched[1]


def answer(server: Server, model: str, version: str = "") -> object:
    """The version that answers and its first number; None without an answer."""
    path = f"/predict/{model}/{version}" if version else f"/predict/{model}"
    reply = server.post(path, json={"inputs": [[1.0, 2.0]]})
    if reply.status_code != 200:
        return None
    return reply.json()["version"], reply.json()["outputs"]["y"][0][0]


def wait_for_answer(server: Server, expected: object, model: str, version: str = "") -> None:
    wait_until(lambda: answer(server, model, version) == expected, f"{model} answers {expected}")


def test_a_folder_that_is_renamed_into_place_is_served(server: Server, folder: Path, tmp_path: Path) -> None:
    write_shift(tmp_path, "renamed", 1, 1.0)
    (tmp_path / "renamed").rename(folder / "renamed")
    wait_for_answer(server, ("1", 2.0), "renamed")
    write_shift(folder, "renamed", 2, 2.0)
    wait_for_answer(server, ("2", 3.0), "renamed")
    assert answer(server, "renamed", "1") == ("1", 2.0)


def test_a_file_that_comes_in_pieces_is_loaded_once_it_is_complete(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    whole = (write_shift(tmp_path, "pieces", 1, 1.0) / "model.onnx").read_bytes()
    target = folder / "pieces" / "1" / "model.onnx"
    target.parent.mkdir(parents=True)
    with target.open("wb", buffering=0) as file:
        for number in range(len(whole)):
            file.write(whole[number : number + 1])
    wait_for_answer(server, ("1", 2.0), "pieces")
    assert not any("pieces/1 has failed" in line["message"] for line in server.log)


def test_a_link_that_a_config_map_switches_exchanges_the_version(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    version = folder / "mapped" / "1"
    version.mkdir(parents=True)
    for number in (1, 2):
        made = write_shift(tmp_path / str(number), "mapped", 1, float(number))
        shutil.move(made, version / f"..{number}")
    (version / "..data").symlink_to("..1")
    (version / "model.onnx").symlink_to("..data/model.onnx")
    wait_for_answer(server, ("1", 2.0), "mapped")
    (version / "..new").symlink_to("..2")
    (version / "..new").rename(version / "..data")
    wait_for_answer(server, ("1", 3.0), "mapped")


def test_a_version_that_vanishes_drains_and_goes(server: Server, folder: Path) -> None:
    for number in (1, 2):
        write_shift(folder, "vanishing", number, float(number))
    wait_for_answer(server, ("2", 3.0), "vanishing")
    shutil.rmtree(folder / "vanishing" / "2")
    wait_for_answer(server, ("1", 2.0), "vanishing")
    wait_until(lambda: server.get("/models/vanishing/2").status_code == 404, "the version is gone")
    shutil.rmtree(folder / "vanishing")
    wait_until(lambda: server.get("/models/vanishing").status_code == 404, "the model is gone")
    write_shift(folder, "vanishing", 2, 5.0)
    wait_for_answer(server, ("2", 6.0), "vanishing")


def test_a_failed_version_is_tried_again_when_its_files_change(server: Server, folder: Path) -> None:
    broken = folder / "mended" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    server.wait_for("mended/1 has failed")
    write_shift(folder, "mended", 1, 1.0)
    wait_for_answer(server, ("1", 2.0), "mended")


def test_a_changed_model_toml_takes_effect(server: Server, folder: Path) -> None:
    for number in (1, 2):
        write_shift(folder, "configured", number, float(number))
    wait_for_answer(server, ("2", 3.0), "configured")
    config = folder / "configured" / "model.toml"
    config.write_text("[versions]\nlabels = {stable = 1}\n")
    wait_for_answer(server, ("1", 2.0), "configured")
    config.write_text('[batching]\nenabled = false\n[versions]\nserve = "latest"\n')
    wait_for_answer(server, ("2", 3.0), "configured")
    wait_until(
        lambda: server.get("/models/configured/2").json()["batching"]["reason"] == "turned off in model.toml",
        "the version is loaded with the new settings",
    )
    wait_until(lambda: server.get("/models/configured/1").status_code == 404, "version 1 is gone")
    config.write_text("batch = 1\n")
    server.wait_for("batch: unknown key")
    assert answer(server, "configured") == ("2", 3.0)
