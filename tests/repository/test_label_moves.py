"""Labels that were moved survive a restart, until `model.toml` decides anew."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from inferpool.repository.label_moves import MOVES_FILE, LabelMove, apply_moves, keep_moves, read_moves

from tests.conftest import Serve
from tests.onnx_models import write_shift


def test_a_move_counts_until_the_owner_decides_anew() -> None:
    moves = {"stable": LabelMove(2, 1), "canary": LabelMove(None, 3), "new": LabelMove(1, None)}
    assert apply_moves({"stable": 1, "canary": 3}, moves) == {"stable": 2, "new": 1}
    assert apply_moves({"stable": 3, "canary": 2, "new": 2}, moves) == {"stable": 3, "canary": 2, "new": 2}


def test_moves_are_kept_beside_the_model(tmp_path: Path) -> None:
    moves = {"stable": LabelMove(2, 1), "old": LabelMove(None, 1)}
    assert keep_moves(tmp_path, moves)
    assert read_moves(tmp_path) == moves
    assert [item.name for item in tmp_path.iterdir()] == [MOVES_FILE]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"labels": {"a": 1}}', '{"labels": {"a": {"version": -1}}}']
)
def test_a_damaged_file_of_moves_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / MOVES_FILE).write_text(content)
    assert read_moves(tmp_path) == {}


def test_a_folder_that_cannot_be_written_keeps_no_moves(tmp_path: Path) -> None:
    assert not keep_moves(tmp_path / "missing", {"stable": LabelMove(2, 1)})
    assert not keep_moves(None, {"stable": LabelMove(2, 1)})


def test_a_label_survives_a_restart(serve: Serve, tmp_path: Path) -> None:
    for version in (1, 2):
        write_shift(tmp_path, "kept", version, float(version))
    server = serve(tmp_path, "--admin-routes", "on")
    assert httpx.put(f"{server.url}/models/kept/labels/stable", json={"version": 1}).json()["kept"]
    server.stop()
    again = serve(tmp_path)
    assert again.get("/models/kept").json()["labels"] == {"stable": 1}
    assert again.post("/predict/kept", json={"inputs": [[1.0, 2.0]]}).json()["version"] == "1"
