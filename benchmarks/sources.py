"""The models of tutorials, trained by Keras and by PyTorch: imported, evaluated, optimised and explained.

    python benchmarks/sources.py FOLDER [NAME ...] --data DATA [--page PAGE]

Trains each model twice, writes the file of its framework, runs `inferpool import`, `evaluate` and `optimise`
on it, and asks a server to explain an answer. The output goes into FOLDER/NAME.md, and --page joins these
files. NAME-keras or NAME-torch makes one of the two models, and NAME-explain only explains those that were
made. It needs keras, onnxscript, scikit-learn, tokenizers and torch.

DATA has a folder for each model, in the usual layout; nothing of it is part of this repository:

    digits/train/7/*.png, digits/test/7/*.png            MNIST
    cifar10/train/cat/*.jpg, cifar10/test/cat/*.jpg      CIFAR-10
    reviews/aclImdb/train/pos/*.txt                      the reviews of IMDb
    news/*.csv                                           AG News: class from 1, title, description
    prices/housing.csv                                   districts of California
    closes/closes.csv                                    a share, oldest first, with the column Close

`diabetes` is scikit-learn's, and `words` reads the texts of Python's `help()`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import httpx
import keras
import numpy as np
import source_networks
import source_networks_keras
import torch
from source_data import READERS, SEED, Data

EPOCHS = {
    "digits": 6, "cifar10": 8, "reviews": 8, "news": 6, "words": 4, "diabetes": 60, "prices": 10, "closes": 10
}  # fmt: skip
RATES = {"digits": 2e-3, "cifar10": 1e-3, "reviews": 5e-3, "news": 2e-3, "words": 5e-3, "diabetes": 1.0}
"""How fast each learns; 3e-3 for the others."""
TABLES = {
    "digits": '[image]\nmode = "grey"\nlayout = "{layout}"\n',
    "cifar10": '[image]\nlayout = "{layout}"\n',
    "reviews": "[text]\n",
    "news": "[text]\n",
    "words": "[text]\n",
}
FRAMEWORKS = ("keras", "torch")
EXPLAIN = "explain"
TOLERANCE = 0.05
"""How far an answer may be from its golden sample, absolutely or as a share of the value."""
SHOWN = 4


def train_keras(name: str, data: Data, work: Path) -> list[str]:
    """Train by Keras; returns the arguments of `inferpool import`."""
    keras.utils.set_random_seed(SEED)
    model = getattr(source_networks_keras, name)()
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.adapt(data.rows)
    loss = "mse" if data.labels is None else "sparse_categorical_crossentropy"
    model.compile(optimizer=keras.optimizers.Adam(RATES.get(name, 3e-3)), loss=loss)
    model.fit(data.rows, data.answers, epochs=EPOCHS[name], batch_size=64, verbose=0)
    model.save(work / f"{name}.keras")
    return [str(work / f"{name}.keras")]


def train_torch(name: str, data: Data, work: Path) -> list[str]:
    """Train by PyTorch; returns the arguments of `inferpool import`."""
    torch.manual_seed(SEED)
    module = getattr(source_networks, name)()
    optimizer = torch.optim.Adam(module.parameters(), lr=RATES.get(name, 3e-3))
    inputs = {key: torch.from_numpy(rows) for key, rows in as_torch(name, data.rows).items()}
    targets = torch.from_numpy(data.answers)
    if hasattr(module, "fit_scales"):
        module.fit_scales(inputs["features"])
    for _ in range(EPOCHS[name]):
        for picked in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            answered = module(*(rows[picked] for rows in inputs.values()))
            if data.labels is None:
                loss = torch.nn.functional.mse_loss(answered[:, 0], targets[picked])
            else:
                loss = torch.nn.functional.cross_entropy(answered, targets[picked])
            loss.backward()
            optimizer.step()
    torch.save(module.state_dict(), work / f"{name}.pt")
    file = Path(source_networks.__file__)
    return [f"{file}:{name}", "--weights", str(work / f"{name}.pt"), "--trust"]


def as_torch(name: str, rows: Any) -> dict[str, Any]:
    """Return the inputs of the network of PyTorch by name: channels first, and a mask if it takes one."""
    if rows.ndim == 4:
        return {"input": np.ascontiguousarray(rows.transpose(0, 3, 1, 2))}
    if name == "reviews":
        return {"input_ids": rows, "attention_mask": (rows != 0).astype(np.int64)}
    if rows.dtype == np.int64:
        return {"input_ids": rows}
    return {"closes" if name == "closes" else "features": rows}


def inferpool(*arguments: str) -> str:
    """Run a command of inferpool, and return what it prints; raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "inferpool", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, file=sys.stderr, flush=True)
    return done.stdout.strip()


def make_model(name: str, framework: str, data: Data, work: Path) -> str:
    """Train, import, evaluate and optimise; returns what the commands print."""
    keras_is_used = framework == "keras"
    given = (train_keras if keras_is_used else train_torch)(name, data, work)
    example = {"example": data.example} if keras_is_used else as_torch(name, data.example)
    np.savez(work / "example.npz", **example)
    more = []
    if data.labels is not None:
        (work / "labels").write_text("".join(f"{label}\n" for label in data.labels), "utf-8")
        more = ["--labels", str(work / "labels")]
    target = work / "models" / f"{name}-{framework}"
    shutil.rmtree(target, ignore_errors=True)
    printed = [
        inferpool("import", *given, "--example", str(work / "example.npz"), "--to", str(target), *more)
    ]
    sample = target / "samples" / "imported.json"
    # A form with rounder numbers could not keep the tolerance of the import.
    sample.write_text(json.dumps({**json.loads(sample.read_text()), "tolerance": TOLERANCE}))
    if data.tokenizer is not None:
        data.tokenizer.save(str(target / "tokenizer.json"))
    table = TABLES.get(name, "").format(layout="HWC" if keras_is_used else "CHW")
    with (target / "model.toml").open("a", encoding="utf-8") as file:
        # The new version that optimise writes must not answer by itself.
        file.write(f"\n{table}\n[versions]\nlabels = {{stable = 1}}\n")
    goal = "rmse +2%" if data.labels is None else "accuracy -0.5pp"
    task = ["--task", "next-word"] if name == "words" else []
    printed.append(inferpool("evaluate", str(target), "--data", str(data.held_out), *task))
    printed.append(inferpool("optimise", str(target), "--data", str(data.held_out), "--goal", goal))
    return "\n\n".join(printed)


def explain(models: Path, asked: tuple[bytes, str], names: list[str]) -> dict[str, str]:
    """Return what a server says of why each model answers as it does; the sums have to hold."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "inferpool", "serve", str(models), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until = time.monotonic() + 120
            while True:
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server of {models} is not ready: {client.get('/health').text}")
                time.sleep(0.5)
            said = {}
            for name in names:
                answer = client.post(
                    f"/explain/{name}?budget_ms=30000", content=asked[0], headers={"content-type": asked[1]}
                )
                if answer.status_code != 200:
                    raise RuntimeError(f"{name}: {answer.text}")
                said[name] = describe(answer.json()["explanations"][0])
    finally:
        server.terminate()
        server.wait(30)
    return said


def describe(found: dict[str, Any]) -> str:
    """Return an explanation in two lines; raises RuntimeError if it does not add up."""
    if not found["additivity"]["holds"]:
        raise RuntimeError(f"the contributions do not add up: {found['additivity']}")
    if found["kind"] == "patches":
        heat = found["heat_map"]
        across = -(-heat["width"] // heat["patch"])
        grid = np.array(heat["contributions"]).reshape(-1, across)
        parts = [
            (f"patch at row {row * heat['patch']}, column {column * heat['patch']}", float(value))
            for (row, column), value in np.ndenumerate(grid)
        ]
    else:
        parts = [
            (str(part.get("word") or part.get("column") or part["index"]), part["contribution"])
            for part in found["contributions"]
        ]
    parts.sort(key=lambda part: -abs(part[1]))
    label = "" if found["label"] is None else f" of {found['label']}"
    value, base, off = found["value"], found["base"], abs(found["additivity"]["difference"])
    largest = ", ".join(f"{name} {share:+.4g}" for name, share in parts[:SHOWN])
    return (
        f"value{label} {value:.5g} = {found['baseline']} {base:.5g} + {len(parts)} contributions;"
        f" off by {off:.1g}, {found['passes']} passes\nlargest: {largest}"
    )


def run_case(name: str, frameworks: Sequence[str], folder: Path, data_folder: Path) -> None:
    """Make models of a name, explain an answer of each that was made, and write the section of the page."""
    work = folder / name
    work.mkdir(parents=True, exist_ok=True)
    data = READERS[name](data_folder, work)
    for framework in frameworks:
        (work / f"{framework}.txt").write_text(make_model(name, framework, data, work), "utf-8")
    printed = {
        f"{name}-{file.stem}": file.read_text("utf-8").replace(f"{folder}/", "FOLDER/")
        for file in sorted(work.glob("*.txt"))
    }
    said = explain(work / "models", data.asked, list(printed))
    lines = [f"{data.about[0].upper()}{data.about[1:]}. The network learns in {EPOCHS[name]} passes."]
    for model, text in printed.items():
        whole = "\n".join(line.rstrip() for line in f"{text}\n\n{said[model]}".splitlines())
        lines.append(f"## {model}\n\n```text\n{whole}\n```")
    section = f"# {name}\n\n" + "\n\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(section, "utf-8")
    print(section, flush=True)


def join_sections(folder: Path) -> str:
    """Return the page of all models that were made."""
    packages = ", ".join(f"{each} {version(each)}" for each in ("onnxruntime", "onnx", "torch", "keras"))
    found = [folder / f"{name}.md" for name in READERS if (folder / f"{name}.md").is_file()]
    sections = [file.read_text("utf-8").replace("\n## ", "\n### ").replace("# ", "## ", 1) for file in found]
    models = [f"{name}-{framework}" for name in READERS for framework in FRAMEWORKS]
    missing = [f"`{model}`" for model in models if not any(f"## {model}\n" in each for each in sections)]
    if missing:
        sections.append(f"The models {', '.join(missing)} of the script were not run for this page.\n")
    return (
        "# Models of tutorials, by Keras and by PyTorch\n\n"
        f"`python benchmarks/sources.py FOLDER --data DATA`, {datetime.now(UTC):%Y-%m-%d};"
        f" {os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, {packages}.\n\n"
        "Each model is trained on a part of its data, imported, judged by other rows, and optimised. A\n"
        "server explains its answer to one row. The cores had other work, so compare times within a table\n"
        "only.\n\n" + "\n".join(sections)
    )


def processor() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Make the models that are named, and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(READERS)} [all]")
    parser.add_argument("--data", type=Path, default=Path(), help="the folder of the data")
    parser.add_argument("--page", type=Path, help="where to write the page of all models in FOLDER")
    chosen = parser.parse_args()
    for chosen_name in chosen.names or ([] if chosen.page else READERS):
        name, _, framework = chosen_name.partition("-")
        made = {"": FRAMEWORKS, EXPLAIN: ()}.get(framework, (framework,))
        run_case(name, made, chosen.folder, chosen.data)
    if chosen.page:
        chosen.page.write_text(join_sections(chosen.folder), "utf-8")


if __name__ == "__main__":
    main()
