"""`inferpool predict`: each format in and out, rows with errors, and runs that were killed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool import cli
from inferpool.client.content import Sentences
from inferpool.errors import Conflict, InvalidInput
from inferpool.predict_command.finished_chunks import Finished, FinishedChunks
from inferpool.predict_command.rows_in import open_source

from tests.server import Server, wait_until

COLUMNS = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
ROWS = np.array([[20 + row, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87] for row in range(40)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path, cache_dir: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("digits", "diabetes"):
        shutil.copytree(models / name, folder / name)
    server = Server(folder, ("--measure-ms", "20"), {"INFERPOOL_CACHE_DIR": str(cache_dir)})
    server.wait_loaded()
    yield server
    server.kill()


def write_rows(path: Path) -> Path:
    """Write `ROWS` in the format of the suffix."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *ROWS.tolist()])
    elif path.suffix == ".jsonl":
        lines = (json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in ROWS.tolist())
        path.write_text("\n".join(lines))
    elif path.suffix == ".ndjson":
        path.write_text("\n".join(json.dumps(row) for row in ROWS.tolist()))
    elif path.suffix == ".npy":
        np.save(path, ROWS)
    elif path.suffix == ".npz":
        np.savez(path, features=ROWS)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {name: ROWS[:, index] for index, name in enumerate(COLUMNS)}
        parquet.write_table(pyarrow.table(columns), path)
    return path


def predict(server: Server, *arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments), "--url", server.url])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[float]:
    answer = server.post("/predict/diabetes", json={"inputs": ROWS.tolist()}).json()
    return [row[0] for row in answer["outputs"]["progression"]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".ndjson", ".npy", ".npz", ".parquet"])
def test_every_format_gives_the_same_rows(
    server: Server, tmp_path: Path, expected: list[float], suffix: str
) -> None:
    file, output = write_rows(tmp_path / f"in{suffix}"), tmp_path / "out.csv"
    assert predict(server, "diabetes", file, "-o", output, "--rows-per-request", 7) == 0
    found = [float(row["progression"]) for row in read_csv(output)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {file.name, output.name}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"age,sex\n\xff,1\n", "rows.csv is not UTF-8: it has the byte 0xff"),
        ("rows.txt", b"fine\n\xc3", "rows.txt is not UTF-8: it has the byte 0xc3"),
        ("rows.csv", b"age\n" + b"9" * 200_000 + b"\n", "rows.csv is not CSV"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=said):
        list(open_source(tmp_path / name, 1).chunks())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".npz"])
def test_every_output_has_the_same_rows(
    server: Server, tmp_path: Path, expected: list[float], suffix: str
) -> None:
    output = tmp_path / f"out{suffix}"
    assert predict(server, "diabetes", write_rows(tmp_path / "in.npy"), "-o", output) == 0
    found: Any
    if suffix == ".jsonl":
        found = [json.loads(line)["progression"] for line in output.read_text().splitlines()]
    elif suffix == ".npz":
        found = np.load(output)["progression"][:, 0]
    else:
        pytest.importorskip("pyarrow")
        from pyarrow import parquet

        found = parquet.read_table(output)["progression"].to_pylist()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_folder_of_pictures_keeps_the_damaged_one_with_its_error(
    server: Server, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        shutil.copy(models / "digits" / "samples" / "7.png", folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    output = tmp_path / "out.csv"
    assert predict(server, "digits", folder, "-o", output, "--labels", "--rows-per-request", 2) == 1
    assert "--keep-errors" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out.csv.parts")
    assert predict(server, "digits", folder, "-o", output, "--labels", "--keep-errors") == 0
    rows = read_csv(output)
    assert [row["file"] for row in rows] == [f"{number}.png" for number in range(5)]
    assert [row["label"] for row in rows] == ["7", "7", "", "7", "7"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, False]
    assert len(rows[0].keys() & {f"logits_{number}" for number in range(10)}) == 10
    assert "5 rows, 1 with an error" in capsys.readouterr().err


def test_lines_of_text_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\r\n\nlast")
    source = open_source(tmp_path / "in.txt", 3)
    assert [chunk.content(0, chunk.rows) for chunk in source.chunks()] == [
        Sentences(["one", "two", ""]),
        Sentences(["last"]),
    ]


def test_errors_of_every_row_end_the_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "in.npy")
    assert predict(server, "nobody", file, "-o", tmp_path / "out.csv", "--keep-errors") == 1
    assert 'no model is called "nobody"' in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out.csv.parts")
    np.save(tmp_path / "narrow.npy", ROWS[:, :3])
    assert (
        predict(server, "diabetes", tmp_path / "narrow.npy", "-o", tmp_path / "out.csv", "--keep-errors") == 1
    )
    assert "every row of the first 40 has an error" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out.csv.parts")
    (tmp_path / "none.csv").write_text(",".join(COLUMNS))
    assert predict(server, "diabetes", tmp_path / "none.csv", "-o", tmp_path / "out.csv") == 1
    assert "the file has no rows" in capsys.readouterr().err


def test_another_run_does_not_mix_its_rows_with_those_of_an_earlier_one(tmp_path: Path) -> None:
    chunk = Finished(0, {"y": np.ones(2)}, ["", ""])
    first = FinishedChunks(tmp_path / "out.csv", {"model": "a"})
    first.add(chunk)
    with pytest.raises(Conflict, match="another run writes"):
        FinishedChunks(tmp_path / "out.csv", {"model": "a"})
    first.close()
    with pytest.raises(Conflict, match="of a run with another file, model or option"):
        FinishedChunks(tmp_path / "out.csv", {"model": "b"})
    again = FinishedChunks(tmp_path / "out.csv", {"model": "a"})
    assert again.starts() == {0}
    again.close()
    assert not (tmp_path / "out.csv").exists()


def test_what_cannot_be_read_or_written_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "in.npy")
    (tmp_path / "in.doc").touch()
    (tmp_path / "old.csv").touch()
    for arguments, message in (
        (("m", file, "-o", tmp_path / "out.doc"), "the output is .csv, .parquet"),
        (("m", tmp_path / "in.doc", "-o", tmp_path / "out.csv"), "in.doc: expected .csv"),
        (("m", tmp_path / "none.csv", "-o", tmp_path / "out.csv"), "No such file"),
        (("m", file, "-o", tmp_path / "old.csv", "--url", "http://127.0.0.1:1"), "old.csv exists"),
        (("/nowhere", file, "-o", tmp_path / "out.csv"), "with --url, MODEL is the name"),
    ):
        assert cli.main(["predict", *map(str, arguments)]) in (1, 2)
        assert message in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on_where_it_was(
    server: Server, tmp_path: Path, models: Path, cache_dir: Path
) -> None:
    """The model is loaded by the command itself; the second run has every row once, and in its place."""
    rows = np.repeat(ROWS, 10, axis=0)
    rows[:, 0] = np.arange(len(rows)) % 90
    np.save(tmp_path / "in.npy", rows)
    output, parts = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    command = [
        *(sys.executable, "-m", "inferpool", "predict", str(models / "diabetes"), str(tmp_path / "in.npy")),
        *("-o", str(output), "--rows-per-request", "2", "--concurrency", "1", "--measure-ms", "20"),
    ]
    environ = {**os.environ, "INFERPOOL_CACHE_DIR": str(cache_dir)}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as first:
        wait_until(lambda: len([*parts.glob("*.npz")]) > 3 or first.poll() is not None, "chunks on disk")
        first.kill()
    assert not output.exists()
    # What a kill in the middle of a chunk leaves behind is no chunk.
    (parts / "000000000398.unfinished").write_bytes(b"PK")
    second = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, check=True)
    assert "from an earlier run" in second.stderr
    answer = server.post("/predict/diabetes", json={"inputs": rows.tolist()}).json()
    found = [[float(row["progression"])] for row in read_csv(output)]
    np.testing.assert_allclose(found, answer["outputs"]["progression"], rtol=1e-5)
    assert len(found) == len(rows)
    assert not parts.exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "inferpool.client", None)
    assert cli.main(["predict", "model", "rows.csv", "-o", str(tmp_path / "out.csv")]) == 1
    printed = capsys.readouterr().err
    assert "inferpool.client is missing: " in printed
    assert "pip install 'inferpool[client]'" in printed
