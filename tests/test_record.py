"""A change of anything that costly tests depend on makes them run again."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import record, test_wheel
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


def imported_tests(file: Path) -> set[Path]:
    """The modules of the tests that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update({f"{node.module}.{alias.name}" for alias in node.names}, {str(node.module)})
    paths = [Path(record.ROOT, *name.split(".")) for name in names if name.startswith("tests.")]
    files = {file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")}
    return {file for file in files if file.exists()}


def test_the_record_of_the_hot_path_has_all_that_its_tests_import() -> None:
    arguments = test_wheel.arguments()
    ignored = {record.ROOT / each.partition("=")[2] for each in arguments if each.startswith("--ignore=")}
    chosen = [record.ROOT / each.partition("::")[0] for each in arguments if not each.startswith("--")]
    todo = {file for path in chosen for file in (path.rglob("*.py") if path.is_dir() else [path])} - ignored
    needed: set[Path] = set()
    while todo:
        needed |= todo
        todo = {found for file in todo for found in imported_tests(file)} - needed
    # A change of the record's own code is another digest if it matters.
    assert needed - {record.ROOT / "tests" / "record.py"} <= set(record.files("compiled-hot-path"))
