"""A change of anything that the tests of a model depend on makes them run again."""

from __future__ import annotations

import ast
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import record
from tests.models.record import MODELS, ROOT, TEST_FILES, digest, needs_to_run


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the digests are made of."""
    root = tmp_path_factory.mktemp("root")
    shutil.copy(ROOT / ".gitignore", root)
    shutil.copy(ROOT / "README.md", root)
    for folder in ("docs", "models", "tests/models", "tests/backends/torch", "service/inferpool"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, str]:
    """The digests of all models, of the copy as it is."""
    return {model: digest(model, copy) for model in MODELS}


@pytest.mark.parametrize(
    "file",
    [
        *(
            "models/transformer.py",
            "models/cifar10/build.py",
            "models/cifar10/README.md",
            "models/cifar10/model.toml",
        ),
        *("tests/models/test_cifar10.py", "tests/models/built.py"),
        *("service/inferpool/backends/onnx/backend.py", "service/inferpool/codecs/image.py"),
        *("service/inferpool/release/build.py", "service/inferpool/repository/load/loader.py"),
    ],
)
def test_a_changed_file_is_noticed(copy: Path, before: dict[str, str], file: str) -> None:
    with changed(copy, file):
        assert digest("cifar10", copy) != before["cifar10"]
    assert digest("cifar10", copy) == before["cifar10"]


@pytest.mark.parametrize(
    ("file", "models"),
    [
        ("tests/backends/torch/test_aotinductor.py", {"aotinductor"}),
        ("tests/backends/torch/networks.py", {"aotinductor"}),
        ("service/inferpool/backends/torch/backend.py", {"aotinductor"}),
        ("tests/models/test_text.py", {"minilm", "news", "next-word", "sentiment"}),
        ("models/minilm/build.py", {"minilm", "news"}),
        ("service/inferpool/backends/onnx/gpu/fp16.py", set()),
        ("service/inferpool/release/importers/scikit_learn.py", set()),
        ("service/inferpool/codecs/text.py", set(MODELS)),
    ],
)
def test_only_the_models_that_depend_on_a_file_change(
    copy: Path, before: dict[str, str], file: str, models: set[str]
) -> None:
    with changed(copy, file):
        assert {model for model in MODELS if digest(model, copy) != before[model]} == models


@contextlib.contextmanager
def changed(copy: Path, file: str) -> Iterator[None]:
    """Let `file` have one more line within the block."""
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content + b"\n")
    try:
        yield
    finally:
        (copy / file).write_bytes(content)


def test_the_build_command_imports_no_other_module_of_its_folder() -> None:
    """The digests have this one alone of the folder."""
    code = (
        "import sys, inferpool.release.build;"
        " print(*[name for name in sys.modules if name.startswith('inferpool.release.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["inferpool.release.build"]


def test_the_tests_of_models_import_no_file_of_another_model() -> None:
    """A digest has the file of its own model's tests, and of the others what several share."""
    for file in {ROOT / name for name in TEST_FILES.values()}:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("tests.models.test_")], file


def test_a_changed_example_of_the_documents_is_noticed(copy: Path) -> None:
    before = {model: digest(model, copy) for model in ("cifar10", "news")}
    page = copy / "docs" / "models.md"
    content = page.read_text()
    page.write_text(content.replace("localhost:8000/predict/cifar10", "localhost:9000/predict/cifar10"))
    assert page.read_text() != content
    assert digest("cifar10", copy) != before["cifar10"]
    assert digest("news", copy) == before["news"]
    page.write_text(content + "\nAnother sentence.\n")
    assert digest("cifar10", copy) == before["cifar10"]


def test_a_new_package_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest("resnet50")
    monkeypatch.setattr(record, "version", lambda name: "99.0" if name == "torch" else "1.0")
    assert digest("resnet50") != before


def test_tests_that_passed_in_one_mode_of_the_engine_run_in_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INFERPOOL_ENGINE", raising=False)
    before = digest("resnet50")
    monkeypatch.setenv("INFERPOOL_ENGINE", "process")
    assert digest("resnet50") != before


def test_what_a_build_writes_and_other_models_are_no_change(copy: Path) -> None:
    before = digest("cifar10", copy)
    built = copy / "models/cifar10/1/model.onnx"
    built.parent.mkdir(exist_ok=True)
    built.write_bytes(b"built")
    (copy / "models/news/README.md").write_text("changed")
    (copy / "tests/models/record.json").write_text("{}")
    assert digest("cifar10", copy) == before


def test_only_unchanged_models_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(record.FULL, raising=False)
    monkeypatch.setattr(record, "recorded", lambda: {"news": digest("news"), "cifar10": "0" * 64})
    needs_to_run("cifar10")
    needs_to_run("minilm")
    with pytest.raises(pytest.skip.Exception, match="nothing of news has changed"):
        needs_to_run("news")
    monkeypatch.setenv(record.FULL, "1")
    needs_to_run("news")


def test_a_missing_record_skips_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(record.FULL, raising=False)
    monkeypatch.setattr(record, "RECORD", tmp_path / "none.json")
    for model in MODELS:
        needs_to_run(model)


@pytest.mark.parametrize(
    ("status", "changes", "written"), [(0, False, True), (0, True, False), (1, False, False)]
)
def test_only_tests_that_passed_with_the_present_files_are_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, changes: bool, written: bool
) -> None:
    digests = iter(["before"] * len(MODELS) + ["after" if changes else "before"] * len(MODELS))
    monkeypatch.setattr(record, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(record, "digest", lambda _: next(digests))
    monkeypatch.setattr(sys, "argv", ["record", "-x"])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status))
    assert (record.main() == 0) == written
    assert record.recorded() == (dict.fromkeys(MODELS, "before") if written else {})
