"""A change of anything that costly tests depend on makes them run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import record
from tests.record import FULL

MOST_CHANGED = 20
"""About as many files of each record are changed in turn; all of a record of hundreds would take minutes."""


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A record that says that all tests have passed with what is here."""
    monkeypatch.delenv(FULL, raising=False)
    digests = {name: record.digest(name) for name in record.COSTLY}
    monkeypatch.setattr(record, "recorded", lambda: digests)


@pytest.mark.parametrize("name", record.COSTLY)
def test_each_pattern_finds_files_and_the_tests_exist(name: str) -> None:
    for pattern in record.COSTLY[name].files:
        assert list(record.ROOT.glob(pattern)), pattern
    for test in record.COSTLY[name].tests:
        assert (record.ROOT / test.partition("::")[0]).exists()


@pytest.mark.parametrize("name", record.COSTLY)
def test_a_changed_file_is_another_digest(name: str, tmp_path: Path) -> None:
    for file in record.files(name):
        copy = tmp_path / file.relative_to(record.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert record.digest(name, tmp_path) == record.digest(name)
    files = sorted(set(record.files(name, tmp_path)))
    for file in files[:: max(1, len(files) // MOST_CHANGED)]:
        text = file.read_bytes()
        file.write_bytes(text + b"\n")
        assert record.digest(name, tmp_path) != record.digest(name)
        file.write_bytes(text)


@pytest.mark.usefixtures("passed")
def test_tests_are_skipped_only_while_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match="nothing of image has changed"):
        record.needs_to_run("image")
    monkeypatch.setenv(FULL, "1")
    record.needs_to_run("image")
    monkeypatch.delenv(FULL)
    monkeypatch.setattr(record, "version", lambda package: "another")
    record.needs_to_run("frameworks")
