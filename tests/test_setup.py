"""Setup.py gives each C compiler only flags that it knows."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import setuptools  # type: ignore[import-untyped]

from tests.conftest import ROOT

# Fails as Clang does at the flags of GCC that it does not know, and takes notes of all others.
CLANG = """#!/bin/sh
for each; do
  case "$each" in
    -findirect-inlining | -fpartial-inlining | -fipa-ra | -fpeephole2)
      echo "error: unknown argument: '$each'" >&2
      exit 1 ;;
  esac
done
echo "$@" >>"$NOTES"
exec cc "$@"
"""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler: apt-get install gcc")


@pytest.mark.parametrize("knows_all", [False, True])
def test_a_compiler_without_the_passes_of_gcc_compiles_with_o2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, knows_all: bool
) -> None:
    notes, compiler, source = tmp_path / "notes", tmp_path / "compiler", tmp_path / "one.c"
    compiler.write_text(CLANG.replace("exit 1", ":") if knows_all else CLANG)
    compiler.chmod(0o755)
    source.write_text("int PyInit_one(void) { return 0; }\n")
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    build = runpy.run_path(str(ROOT / "setup.py"))
    extension = setuptools.Extension(
        "one", [source.name], extra_compile_args=["-O1", *build["INLINING"], "-g0"]
    )
    distribution = setuptools.Distribution(
        {"name": "one", "ext_modules": [extension], "cmdclass": given["cmdclass"]}
    )
    build_ext = distribution.get_command_obj("build_ext")
    build_ext.ensure_finalized()
    build_ext.run()
    commands = map(str.split, notes.read_text().splitlines())
    [compiled] = [command for command in commands if source.name in command]
    levels = [flag for flag in compiled if flag.startswith("-O")]
    assert (levels[-1], "-fipa-ra" in compiled) == (("-O1", True) if knows_all else ("-O2", False))
