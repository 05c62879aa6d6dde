"""Words that the glossary gives up are gone, from names and from prose."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

GLOSSARY = ROOT / "docs" / "contribute" / "glossary.md"
GIVEN_UP = re.compile(r"`(\w+)`( \(name\))?")
PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
NAME = re.compile(r"\w+")
WORD = re.compile(r"[A-Za-z]+")
FOLDERS = ("service", "tests", "benchmarks", "models", "scripts", "docker", "docs", "k8s", ".ci")
PROSE = {".md", ".c", ".h", ".toml", ".yaml", ".yml", ".sh", ""}
SKIPPED = {GLOSSARY, Path(__file__).resolve(), ROOT / "benchmarks" / "results"}


def given_up() -> tuple[set[str], set[str]]:
    """The words that are given up everywhere, in small letters, and those that are given up as names."""
    words, names = set(), set()
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and line.count(" |") >= 3:
            for word, name in GIVEN_UP.findall(line.rsplit(" | ", 1)[-1]):
                if name:
                    names.add(word)
                else:
                    words.add(word.lower())
    return words, names


WORDS, NAMES = given_up()


@cache
def is_given_up(word: str) -> bool:
    """Whether a word, or the word that it is the plural of, is given up."""
    return word.lower() in WORDS or word.lower().removesuffix("s") in WORDS


@cache
def files() -> list[Path]:
    """Every file in which people write names or prose."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.py")]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob("*")
    return [
        file
        for file in found
        if file.is_file()
        and file.suffix in {".py", ".pyi", *PROSE}
        and not SKIPPED.intersection((file, *file.parents))
        and not any(
            part.startswith((".", "_")) and part != ".ci" for part in file.relative_to(ROOT).parts[:-1]
        )
    ]


@cache
def names_one_given_up(name: str) -> bool:
    """Whether a name, or a word of it, is given up."""
    return (
        name in NAMES
        or any(map(is_given_up, PARTS.findall(name)))
        or any(map(is_given_up, WORD.findall(name)))
    )


def hits_in_code(file: Path) -> Iterator[str]:
    """Where a Python file has a word that is given up, as `path:line: word`."""
    where = file.relative_to(ROOT)
    text = file.read_text(encoding="utf-8")
    if not any(map(names_one_given_up, set(NAME.findall(text)))):
        return  # the tokens of a file take milliseconds
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            if token.string in NAMES:
                yield f"{where}:{token.start[0]}: {token.string}"
            for part in PARTS.findall(token.string):
                if is_given_up(part):
                    yield f"{where}:{token.start[0]}: {part} in {token.string}"
        elif token.type in (tokenize.COMMENT, tokenize.STRING):
            for number, line in enumerate(token.string.splitlines()):
                for word in WORD.findall(line):
                    if is_given_up(word):
                        yield f"{where}:{token.start[0] + number}: {word}"


def hits_in_prose(file: Path) -> Iterator[str]:
    """The same for a file that is not Python."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        for word in WORD.findall(line):
            if is_given_up(word):
                yield f"{file.relative_to(ROOT)}:{number}: {word}"


def test_the_glossary_gives_words_up() -> None:
    assert {"muster", "volley", "outlet", "tally", "rung", "ladder", "dialect", "lane"} <= WORDS
    assert {"Place", "Line", "Whole", "Turn", "Link"} <= NAMES


def test_no_module_has_a_name_that_is_given_up() -> None:
    names = {name.lower() for name in NAMES}
    stems = {file.stem.strip("_") for file in (ROOT / "service").rglob("*.*")}
    bad = {stem for stem in stems if stem in names or any(map(is_given_up, stem.split("_")))}
    assert not bad


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_words_that_are_given_up_are_gone(folder: str) -> None:
    root = ROOT / folder
    hits = [
        hit
        for file in files()
        if (file.parent == ROOT if folder == "." else root in file.parents)
        for hit in (hits_in_code(file) if file.suffix in {".py", ".pyi"} else hits_in_prose(file))
    ]
    assert not hits, "\n".join(hits)
