"""The exit status of a command that ends by itself, and what it prints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from inferpool.cli import main
from inferpool.command_output import print_failure, print_lines
from inferpool.errors import ConfigError, InvalidInput


def failing(error: Exception) -> Iterable[str]:
    raise error


def test_the_lines_of_a_result_are_printed_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert print_lines(lambda: ["one", "two\x1b[2J"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "one"
    assert "\x1b" not in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("no such setting"), 2), (InvalidInput("no such column"), 1), (OSError("no disk"), 1)],
)
def test_a_failure_is_one_line_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_lines(lambda: failing(error)) == status
    assert capsys.readouterr().err == f"inferpool: {error}\n"


def test_an_error_of_a_file_is_its_name_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_failure(FileNotFoundError(2, "No such file or directory", "rows.csv")) == 1
    assert capsys.readouterr().err == "inferpool: rows.csv: No such file or directory\n"


def test_a_folder_that_is_not_there_is_not_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"inferpool: {tmp_path / 'none'} does not exist\n")


def test_the_notes_of_an_error_are_printed_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("row 3 is wrong")
    error.add_note("see the file")
    assert print_failure(error) == 1
    assert capsys.readouterr().err == "inferpool: row 3 is wrong (see the file)\n"
