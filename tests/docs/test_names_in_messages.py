"""Messages name flags, keys of `model.toml` and extras that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final, get_args

from inferpool.repository.config import ModelConfig
from pydantic import BaseModel

from tests.server import ROOT

OF_OTHERS: Final = {"--gpus", "--tflite"}
"""Flags of Docker and tf2onnx."""
FLAG: Final = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
EXTRA: Final = re.compile(r"inferpool\[([\w,]+)\]")


def strings() -> Iterator[tuple[str, str]]:
    """Each string but docstrings, with its file and line."""
    for file in sorted((ROOT / "service/inferpool").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "install_command":
                yield (
                    f"{file.relative_to(ROOT)}:{node.lineno}",
                    f"inferpool[{ast.literal_eval(node.args[0])}]",
                )


def keys(table: Any, above: str = "") -> Iterator[str]:
    for name, field in table.model_fields.items():
        yield above + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{above}{name}.")


def test_messages_name_what_exists() -> None:
    pages = [ROOT / "docs/reference" / name for name in ("cli.md", "settings.md")]
    flags = OF_OTHERS.union(*(FLAG.findall(page.read_text("utf-8")) for page in pages))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    known = set(keys(ModelConfig))
    tables = sorted({key.partition(".")[0] for key in known if "." in key} - {"inputs", "outputs"})
    key = re.compile(rf"(?<![\w./-])((?:{'|'.join(tables)})\.[a-z]\w+)(?= = |:| \(|;|,| of its | in model)")
    wrong = []
    for line, text in strings():
        if " " in text and not text.lstrip().startswith(":root"):  # the style of a page
            wrong += [f"{line}: {flag}" for flag in FLAG.findall(text) if flag not in flags]
        wrong += [f"{line}: {each}" for each in key.findall(text) if each not in known]
        named = [extra for found in EXTRA.findall(text) for extra in found.split(",")]
        wrong += [f"{line}: inferpool[{extra}]" for extra in named if extra not in extras]
    assert not wrong
