"""How many web processes a server has unless a setting says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.launch import web_processes


@pytest.mark.parametrize(
    ("cores", "devices", "cards", "expected"),
    [
        (1, ("auto",), 0, 1), (2, ("auto",), 0, 1), (7, ("auto",), 0, 1), (8, ("auto",), 0, 2),
        (64, ("auto",), 0, 16), (2, ("auto",), 1, 1), (8, ("auto",), 1, 4), (8, ("cuda:0",), 2, 4),
        (8, ("cpu",), 1, 2),
    ],
)  # fmt: skip
def test_web_processes_follow_from_cores_and_devices(
    tmp_path: Path, cores: int, devices: tuple[str, ...], cards: int, expected: int
) -> None:
    (tmp_path / "nvidiactl").touch()  # the driver's, not a card
    for card in range(cards):
        (tmp_path / f"nvidia{card}").touch()
    assert web_processes(cores, devices, tmp_path) == expected
