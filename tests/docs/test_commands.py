"""Every command of a document runs as it stands, and prints what stands below it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.docs import pages
from tests.docs.pages import ELLIPSIS, PAGES, ROOT, RUNNABLE, Block
from tests.record import COSTLY, needs_to_run
from tests.server import Server, free_port

COMMAND = ".venv/bin/inferpool"
MADE_ID = re.compile(r"[0-9a-f]{16}")
MEASURED = re.compile(r" +\d+ rows? +in +[\d.]+ ms")
NUMBERS = re.compile(r"\d[\d.e+-]*(, \d[\d.e+-]*)*")
GRPC_PORT = free_port()
WITH_COMMANDS = [
    page
    for page in PAGES
    if any(block.language in RUNNABLE and block.reason_not_run is None for block in pages.blocks(page))
]

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="the documents' examples use curl")


@pytest.fixture
def folder(tmp_path: Path, models: Path) -> Path:
    """A folder like the repository's root, in which a page may write."""
    (tmp_path / "models").symlink_to(models)
    return tmp_path


@pytest.fixture
def stopped_at_the_end() -> Iterator[ExitStack]:
    """Kill the servers that a page has started."""
    with ExitStack() as stack:
        yield stack


def test_examples_are_found() -> None:
    """The pages that show how to start have commands that run."""
    names = {pages.name(page) for page in WITH_COMMANDS}
    assert {"README.md", "docs/getting-started.md", "docs/export-a-model.md", "docs/requests.md"} <= names


def test_a_block_that_does_not_run_says_why() -> None:
    for page in PAGES:
        for block in pages.blocks(page):
            if block.language in RUNNABLE and block.comment and not block.serves:
                assert block.reason_not_run, f"{block} has the comment {block.comment!r}"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=pages.name)
def test_commands_of_a_page_run(
    page: Path, bundled: Server, folder: Path, cache_dir: Path, stopped_at_the_end: ExitStack
) -> None:
    """Blocks run from the top of the page; a block that serves is asked by the blocks below it."""
    if pages.name(page) in COSTLY:
        needs_to_run(pages.name(page))
    environ = {
        "INFERPOOL_CACHE_DIR": str(cache_dir),
        "INFERPOOL_MEASURE_MS": "200",
        "PYTHONPATH": str(ROOT),
    }
    server = bundled
    for block in pages.blocks(page):
        if block.language not in RUNNABLE or block.reason_not_run is not None:
            continue
        if block.serves:
            started = with_port(block.source, GRPC_PORT)
            repository, *flags = shlex.split(started.partition(f"{COMMAND} serve ")[2])
            server = Server(folder / repository, flags, environ, cwd=folder)
            stopped_at_the_end.callback(server.kill)
            server.wait_loaded()
            continue
        output = run(block, server.port, folder, environ)
        if block.output is not None and block.output.language == "json":
            assert_alike(json.loads(block.output.source), json.loads(output), str(block))
        elif block.output is not None:
            assert_matches(block.output.source, output, str(block))


def with_port(source: str, port: int) -> str:
    """The commands with another port for gRPC than the pages have, which a program may use."""
    return source.replace("8001", str(port))


def run(block: Block, port: int, folder: Path, environ: dict[str, str]) -> str:
    """Return the output of a block; fails with its errors if it does not succeed."""
    source = with_port(block.source, GRPC_PORT).replace("localhost:8000", f"127.0.0.1:{port}")
    source = source.replace(COMMAND, f"'{sys.executable}' -m inferpool")
    command = (
        [sys.executable, "-c", source]
        if block.language == "python"
        else ["bash", "-euo", "pipefail", "-c", source]
    )
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block} exits with {done.returncode}: {done.stderr}{done.stdout}"
    return done.stdout


def assert_alike(shown: Any, given: Any, where: str) -> None:
    """JSON values are equal, up to rounding, the ids that the server makes, and `"…"` for any value."""
    if shown == ELLIPSIS:
        return
    if isinstance(shown, dict):
        assert shown.keys() == given.keys(), where
        for key in shown:
            assert_alike(shown[key], given[key], where)
    elif isinstance(shown, list):
        assert len(shown) == len(given), where
        for one, other in zip(shown, given, strict=True):
            assert_alike(one, other, where)
    elif isinstance(shown, str) and MADE_ID.fullmatch(shown):
        assert MADE_ID.fullmatch(given), where
    else:
        assert given == (pytest.approx(shown, rel=1e-4) if isinstance(shown, float) else shown), where


def assert_matches(shown: str, given: str, where: str) -> None:
    """Lines are equal, up to measurements; a line `…` stands for any lines."""
    lines = [
        "(?:.*\n)*" if line == ELLIPSIS else re.escape(line) + "\n" for line in without_measurements(shown)
    ]
    text = "".join(line + "\n" for line in without_measurements(given))
    assert re.fullmatch("".join(lines), text), f"{where} prints:\n{given}"


def without_measurements(text: str) -> list[str]:
    """The lines of a text, without what differs from machine to machine."""
    lines = []
    for line in text.splitlines():
        if line.startswith(("  batching up to", "  runs")):
            lines.append(re.sub(r"(instance|thread)s", r"\1", NUMBERS.sub("#", line)))
        elif not MEASURED.fullmatch(line):
            lines.append(re.sub(r"\d+\.\d+", lambda match: f"{float(match[0]):.6g}", line))
    return lines
