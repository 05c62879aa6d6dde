"""Runs `inferpool optimise` on models of this project, and keeps its tables.

    python benchmarks/optimise.py [--out FOLDER]

Data: the 397 last of scikit-learn's digits, its 442 patients of diabetes, and 300 beginnings of sentences of
Python's help with their next words. Nothing is written to the models.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import pydoc
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes, load_digits

ROOT = Path(__file__).parent.parent
MODULES = ("json", "pathlib", "subprocess", "argparse", "threading", "logging")
"""Modules whose help has the sentences."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    tools = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "numpy"))
    lines = [
        f"# Forms of models, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"`python benchmarks/optimise.py`; {os.cpu_count()} cores of {processor()}, Python"
        f" {platform.python_version()}, {tools}. Times are milliseconds of a run on all cores.",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for model, data, flags in cases(Path(temporary)):
            command = [
                sys.executable,
                "-m",
                "inferpool",
                "optimise",
                str(ROOT / "models" / model),
                "--no-write",
            ]
            command += ["--data", str(data), *flags]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{model}: {done.stderr}")
            shown = " ".join(f"'{flag}'" if " " in flag else flag for flag in flags)
            lines += ["", f"## {model}: `{shown}`", "", "```text", *done.stdout.rstrip().split("\n"), "```"]
            print("\n".join(lines[-20:]), flush=True)
    (options.out / "optimise.md").write_text("\n".join(lines) + "\n")


def processor() -> str:
    """The name of this machine's processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def cases(folder: Path) -> list[tuple[str, Path, list[str]]]:
    """Each model, its data, and the flags of the command."""
    digits = load_digits()
    images = digits.images[1400:, None].astype(np.float32) / 16
    np.savez(folder / "digits.npz", x=images, target=digits.target[1400:])
    patients = load_diabetes(scaled=False, as_frame=True)
    patients.frame.to_csv(folder / "diabetes.csv", index=False)
    with (folder / "next-word.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "target"])
        writer.writerows(sentences(300))
    return [
        ("digits", folder / "digits.npz", ["--goal", "accuracy -0.5pp"]),
        ("diabetes", folder / "diabetes.csv", ["--goal", "rmse +1%"]),
        ("next-word", folder / "next-word.csv", ["--goal", "perplexity +1%", "--task", "next-word"]),
    ]


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
