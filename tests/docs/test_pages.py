"""The pages are whole: every link leads somewhere, every page is found, every table is the code's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from inferpool import cli
from inferpool.observe.logs import request_fields
from inferpool.observe.request_record import RequestRecord
from inferpool.repository.config import ModelConfig
from inferpool.settings import Settings

from tests.docs import pages
from tests.docs.pages import CARDS, INDEX, PAGES, README, ROOT
from tests.server import Server

MOST_README_LINES = 150
GENERATOR = ROOT / "docs" / "reference" / "generate.py"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


@pytest.mark.parametrize("page", [*PAGES, *CARDS, ROOT / "CHANGELOG.md"], ids=pages.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{pages.name(page)} links to {link}, which does not exist"
        if anchor:
            assert anchor in pages.anchors(target), (
                f"{pages.name(page)} links to {link}, which has no such heading"
            )


def test_every_source_file_that_is_named_exists() -> None:
    """A path in a page is the end of a path in the repository: the walks stay true when a file moves."""
    files = [
        file.relative_to(ROOT).parts
        for folder in ("service", "tests", "benchmarks", "docs", "docker", "k8s", "models")
        for file in (ROOT / folder).rglob("*")
    ]
    ends = {"/".join(parts[start:]) for parts in files for start in range(len(parts))}
    ends |= {file.name for file in ROOT.iterdir()}
    for page in PAGES:
        named = re.findall(r"`([\w./-]+\.(?:py|c|yml|yaml))`", page.read_text(encoding="utf-8"))
        assert set(named) <= ends, pages.name(page)


def test_every_page_is_two_clicks_from_the_readme() -> None:
    """The README links to the index and to most pages; the index links to all."""

    def linked(page: Path) -> set[Path]:
        return {(page.parent / link.partition("#")[0]).resolve() for link in pages.links(page)}

    assert INDEX in linked(README)
    assert {page for page in PAGES if page not in (README, INDEX)} <= linked(INDEX) | linked(README)


def test_every_block_has_a_language_that_is_known() -> None:
    for page in PAGES:
        for block in pages.blocks(page):
            assert block.language in pages.LANGUAGES, f"{block} is {block.language!r}"


def test_configuration_that_is_shown_is_valid() -> None:
    """Every block of TOML is a `model.toml`, or settings if a comment says so; every block of JSON parses."""
    for page in PAGES:
        for block in pages.blocks(page):
            if block.language == "toml":
                kind = Settings if block.comment == "settings" else ModelConfig
                kind.model_validate(tomllib.loads(block.source))
            elif block.language == "json":
                json.loads(block.source)


def test_the_reference_is_written_by_the_code() -> None:
    """`docs/reference/generate.py` would change no page."""
    run = subprocess.run([sys.executable, GENERATOR, "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stderr}run docs/reference/generate.py"


def test_help_prints_the_settings_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`inferpool serve --help` has every row of the table, and no flag besides but these three."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    rows = pages.table(ROOT / "docs" / "reference" / "settings.md", "flag")
    for _, variable, default, description in rows:
        assert f"{description} [{variable.strip('`')}; default: {default.strip('`')}]" in text
    flags = {flag for flag in re.findall(r"--[\w-]+", text.partition("options:")[2]) if "--no-" not in flag}
    assert flags == {row[0].strip("`") for row in rows} | {"--config", "--help", "--model_name"}


def test_help_says_what_each_command_and_each_option_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text is a default in brackets alone, and none shows the doubled percent sign of its source."""
    monkeypatch.setenv("COLUMNS", "400")
    waiting: list[list[str]] = [[]]
    seen = 0
    while waiting:
        command = waiting.pop()
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        text = capsys.readouterr().out
        assert "%%" not in text, command
        assert not re.findall(r"^ +-.* {2,}\[[^]]*\]$", text, re.MULTILINE), command
        listed = re.search(r"^  (?:COMMAND|ACTION)\b.*\n((?: {4}.*\n)+)", text, re.MULTILINE)
        names = re.findall(r"^ {4}(\S+)", listed[1], re.MULTILINE) if listed else []
        waiting += [[*command, name] for name in names]
        seen += 1
    assert seen > 25


def test_the_table_of_components_is_the_folders() -> None:
    rows = pages.table(ROOT / "docs" / "deploy" / "kubernetes.md", "component")
    folders = {folder.name for folder in (ROOT / "k8s" / "components").iterdir()}
    assert {row[0].strip("`") for row in rows} == folders


def test_the_table_of_log_fields_is_the_code_s() -> None:
    rows = pages.table(ROOT / "docs" / "operate" / "logs.md", "field")
    named = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows))
    record = RequestRecord(0.0, "", None, 200, "ok", None, None, None, None, None, None, 0.0, 0, 0)
    assert set(named) == set(request_fields(record._replace(left_out=1)))


def test_the_table_of_extras_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = pages.table(ROOT / "docs" / "deploy" / "install.md", "extra")
    assert {row[0].strip("`") for row in rows} == set(project["optional-dependencies"])


def test_the_table_of_models_is_the_folder() -> None:
    rows = pages.table(ROOT / "docs" / "models.md", "folder")
    named = {match[1] for row in rows if (match := re.match(r"\[(.+)\]", row[0]))}
    assert named == {card.parent.name for card in CARDS}


def test_every_route_is_documented(bundled: Server) -> None:
    """Each path of the API's own document stands in a page, but for those of a model by name."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    served = [f"/{model['name']}" for model in bundled.get("/models").json()["models"]]
    for path in bundled.get("/openapi.json").json()["paths"]:
        if any(model in path for model in served):
            continue
        assert re.search(f"[` ]{re.sub('{(.*?)}', lambda m: m[1].upper(), path)}`", text), path
