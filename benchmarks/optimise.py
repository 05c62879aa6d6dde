"""Runs `inferpool optimise` on models of this project, and keeps its tables.

    python benchmarks/optimise.py [--out FOLDER] [NAME ...]

The data:

- `digits`: the held-out fifth of scikit-learn's digits; `build.py` trains on the other rows;
- `diabetes`: scikit-learn's 442 patients;
- `next-word`: 300 beginnings of sentences of Python's help with their next words;
- `minilm`: 150 functions of Python's library: the first sentence of a help text finds what follows it;
- `resnet50`: 48 pictures of noise. Its weights are random if it was built so, and its answers mean nothing:
  the right answers are its own, and the accuracy of a form is how often it agrees with the original.

Nothing is written to the models. A model that is not built is left out. With NAMES, only their tables are
renewed. At the end the whole file is printed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import inspect
import os
import platform
import pydoc
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

ROOT = Path(__file__).parent.parent
MODULES = ("json", "pathlib", "subprocess", "argparse", "threading", "logging")
"""Modules whose help has the sentences."""
DOCUMENTED = """
    argparse ast asyncio bisect codecs collections concurrent.futures contextlib copy csv datetime
    difflib email.utils fractions functools gettext heapq html inspect io itertools json locale
    logging math multiprocessing operator os pathlib pickle platform pprint random re shutil signal
    socket sqlite3 statistics string subprocess sys tempfile textwrap threading time traceback types
    typing unittest unittest.mock urllib.parse urllib.request uuid warnings weakref zipfile numpy
"""
"""Modules whose functions are searched for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models [all]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    file = options.out / "optimise.md"
    tables = read_tables(file) if options.names else {}
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.names or CASES:
            if not (ROOT / "models" / model / "1" / "model.onnx").exists():
                print(f"{model} is not built: inferpool build {model}", file=sys.stderr)
                continue
            data, flags = CASES[model](Path(temporary))
            command = [
                sys.executable,
                "-m",
                "inferpool",
                "optimise",
                str(ROOT / "models" / model),
                "--no-write",
            ]
            command += ["--data", str(data), *flags]
            began = datetime.datetime.now(datetime.UTC)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            shown = " ".join(f"'{flag}'" if " " in flag else flag for flag in flags)
            load = f"{os.getloadavg()[0]:.1f}"
            tables[model] = (
                f"{began:%Y-%m-%d}, load of the machine at the end {load}:\n\n"
                f"`inferpool optimise models/{model} --no-write {shown}`\n\n"
                f"```text\n{done.stdout.rstrip()}\n```"
            )
            took = datetime.datetime.now(datetime.UTC) - began
            print(f"{model}: {took.total_seconds():.0f} s", file=sys.stderr, flush=True)
            write(file, tables)
    print(file.read_text())


def write(file: Path, tables: Mapping[str, str]) -> None:
    """Write the tables of all models."""
    tools = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "numpy", "torch-pruning"))
    head = (
        "# Forms of models\n\n"
        f"`python benchmarks/optimise.py`; {os.cpu_count()} cores of {processor()}, Python"
        f" {platform.python_version()}, {tools}. A p50 is in milliseconds of a run of so many rows on all"
        " cores, and rows/s follow from it.\n"
    )
    parts = [f"## {model}\n\n{tables[model]}\n" for model in CASES if model in tables]
    file.write_text("\n".join([head, *parts]))


def read_tables(file: Path) -> dict[str, str]:
    """Return the tables of an earlier run by model."""
    text = file.read_text() if file.exists() else ""
    parts = re.split(r"(?m)^## ([\w-]+)$", text)
    return {name: part.strip() for name, part in zip(parts[1::2], parts[2::2], strict=True)}


def processor() -> str:
    """The name of this machine's processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def digits(folder: Path) -> tuple[Path, list[str]]:
    sys.path.insert(0, str(ROOT / "models" / "digits"))
    import build

    images, labels = build.held_out()
    np.savez(folder / "digits.npz", image=build.to_rows(images), target=labels)
    return folder / "digits.npz", ["--goal", "accuracy -0.5pp", "--fine-tune", "20"]


def diabetes(folder: Path) -> tuple[Path, list[str]]:
    patients = load_diabetes(scaled=False, as_frame=True)
    patients.frame.to_csv(folder / "diabetes.csv", index=False)
    return folder / "diabetes.csv", ["--goal", "rmse +1%"]


def next_word(folder: Path) -> tuple[Path, list[str]]:
    write_table(folder / "next-word.csv", ("text", "target"), sentences(300))
    return folder / "next-word.csv", ["--goal", "perplexity +1%", "--task", "next-word"]


def minilm(folder: Path) -> tuple[Path, list[str]]:
    found = functions(150)
    search = folder / "search"
    search.mkdir()
    write_table(search / "queries.csv", ("id", "text"), [(at, each[0]) for at, each in enumerate(found)])
    write_table(search / "documents.csv", ("id", "text"), [(at, each[1]) for at, each in enumerate(found)])
    write_table(search / "relevant.csv", ("query", "document"), [(at, at) for at in range(len(found))])
    return search, ["--goal", "ndcg_at_10 -1pp", "--calibration-rows", "64"]


def resnet50(folder: Path) -> tuple[Path, list[str]]:
    import onnxruntime as ort

    pictures = np.random.default_rng(0).normal(size=(48, 3, 224, 224)).astype(np.float32)
    session = ort.InferenceSession(ROOT / "models/resnet50/1/model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    names = (ROOT / "models/resnet50/labels.txt").read_text().splitlines()
    best = [int(session.run(None, {name: pictures[at : at + 1]})[0].argmax()) for at in range(len(pictures))]
    np.savez(folder / "noise.npz", **{name: pictures, "target": np.array([names[at] for at in best])})
    return folder / "noise.npz", ["--goal", "accuracy -2pp", "--calibration-rows", "8"]


CASES = {
    "digits": digits,
    "diabetes": diabetes,
    "next-word": next_word,
    "minilm": minilm,
    "resnet50": resnet50,
}
"""For each model, what writes its data into a folder, and returns their path and the flags of the command."""


def write_table(file: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        writer.writerows(rows)


def functions(count: int) -> list[tuple[str, str]]:
    """First sentences of the help of functions and classes, and the rest of it."""
    found = {}
    for name in DOCUMENTED.split():
        for each in vars(importlib.import_module(name)).values():
            text = " ".join((inspect.getdoc(each) or "").split()) if callable(each) else ""
            first, dot, rest = text.partition(". ")
            if dot and 20 < len(first) < 200 and len(rest) > 60:
                found[first] = rest[:100]
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    return [list(found.items())[number] for number in sorted(chosen)]


def sentences(count: int) -> list[tuple[str, str]]:
    """Beginnings of sentences of at least three words, and the words that follow."""
    known = set((ROOT / "models" / "next-word" / "labels.txt").read_text().split())
    found = []
    for module in MODULES:
        text = pydoc.render_doc(__import__(module), renderer=pydoc.plaintext)
        for sentence in re.findall(r"[A-Z][a-z]+(?: [a-z]+){4,12}", text):
            words = sentence.lower().split()
            found += [
                (" ".join(words[:end]), words[end]) for end in range(3, len(words)) if words[end] in known
            ]
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[number] for number in sorted(chosen)]


if __name__ == "__main__":
    main()
