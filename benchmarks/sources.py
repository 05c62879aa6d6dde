"""The models of tutorials, trained by Keras and by PyTorch: imported, evaluated and optimised, with figures.

    python benchmarks/sources.py FOLDER [NAME ...]

Trains each model twice, writes the file of its framework, and runs `inferpool import`, `evaluate` and
`optimise` on it. Their output goes into the card of the model in FOLDER. It needs keras, onnxscript,
scikit-learn and torch. The data are those that need no download:

- `digits`: scikit-learn's scans of 8×8, enlarged to the layout of MNIST, which is not to be had;
- `diabetes`: scikit-learn's patients, by linear regression;
- `reviews`: made-up rows of words, some of which are kind and some not, in place of the reviews of IMDb.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import source_networks
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split

SEED = 0
EPOCHS = {"digits": 8, "diabetes": 60, "reviews": 6}
GOALS = {"digits": "accuracy -0.5pp", "diabetes": "rmse +2%", "reviews": "accuracy -0.5pp"}


def read_digits() -> tuple[Any, Any]:
    """Return pictures [rows, 28, 28, 1] from 0 to 1, and their digits."""
    found = load_digits()
    large = np.kron(found.images / 16, np.ones((3, 3)))
    return np.pad(large, ((0, 0), (2, 2), (2, 2)))[..., None].astype(np.float32), found.target


def read_diabetes() -> tuple[Any, Any]:
    """Return measurements [rows, 10], scaled, and the progression [rows]."""
    rows, answers = load_diabetes(return_X_y=True)
    return (rows * 20).astype(np.float32), answers.astype(np.float32)


def read_reviews() -> tuple[Any, Any]:
    """Return made-up reviews [rows, 16] of words from 0 to 63: the first eight are kind, the next not."""
    source = np.random.default_rng(SEED)
    rows = source.integers(16, 64, (2000, 16))
    kind = source.integers(0, 2, 2000)
    for row, good in zip(rows, kind, strict=True):
        places = source.choice(16, 3, replace=False)
        row[places] = source.integers(0, 8, 3) + (0 if good else 8)
        row[source.integers(0, 16)] = source.integers(0, 16)  # and one of any kind
    return rows, kind


def keras_model(name: str) -> Any:
    """Return the network of `name` in Keras."""
    layers = keras.layers
    if name == "digits":
        return keras.Sequential([
            keras.Input((28, 28, 1), name="image"), layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.Conv2D(16, 3, strides=2, activation="relu"), layers.Flatten(),
            layers.Dense(10, activation="softmax", name="digit"),
        ])  # fmt: skip
    if name == "diabetes":
        return keras.Sequential([keras.Input((10,), name="features"), layers.Dense(1, name="progression")])
    return keras.Sequential([
        keras.Input((16,), dtype="int32", name="tokens"), layers.Embedding(64, 8),
        layers.GlobalAveragePooling1D(), layers.Dense(2, activation="softmax", name="opinion"),
    ])  # fmt: skip


def train_keras(name: str, rows: Any, answers: Any, work: Path) -> list[str]:
    """Train by Keras; returns the arguments of `inferpool import`."""
    keras.utils.set_random_seed(SEED)
    model = keras_model(name)
    loss = "mse" if name == "diabetes" else "sparse_categorical_crossentropy"
    model.compile(optimizer=keras.optimizers.Adam(1.0 if name == "diabetes" else 5e-3), loss=loss)
    model.fit(rows, answers, epochs=EPOCHS[name], batch_size=64, verbose=0)
    model.save(work / f"{name}.keras")
    return [str(work / f"{name}.keras")]


def train_torch(name: str, rows: Any, answers: Any, work: Path) -> list[str]:
    """Train by PyTorch; returns the arguments of `inferpool import`."""
    torch.manual_seed(SEED)
    module = getattr(source_networks, name)()
    optimizer = torch.optim.Adam(module.parameters(), lr=1.0 if name == "diabetes" else 5e-3)
    inputs, targets = torch.from_numpy(rows), torch.from_numpy(answers)
    loss_of = torch.nn.functional.mse_loss if name == "diabetes" else torch.nn.functional.cross_entropy
    for _ in range(EPOCHS[name]):
        for picked in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            answered = module(inputs[picked])
            loss_of(answered[:, 0] if name == "diabetes" else answered, targets[picked]).backward()
            optimizer.step()
    torch.save(module.state_dict(), work / f"{name}.pt")
    file = Path(source_networks.__file__)
    return [f"{file}:{name}", "--weights", str(work / f"{name}.pt"), "--trust"]


def inferpool(*arguments: str) -> str:
    """Run a command of inferpool, and return what it prints; raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "inferpool", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def main() -> None:
    """Train, import, evaluate and optimise the models that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(EPOCHS))
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    readers = {"digits": read_digits, "diabetes": read_diabetes, "reviews": read_reviews}
    labels = {"digits": "\n".join(map(str, range(10))), "reviews": "negative\npositive"}
    for name in chosen.names:
        rows, answers = readers[name]()
        parts = train_test_split(rows, answers, test_size=0.2, random_state=SEED)
        training, held_out, right, held_out_right = parts
        for framework, train in (("keras", train_keras), ("torch", train_torch)):
            target = chosen.folder / f"{name}-{framework}"
            given = train(name, training, right, chosen.folder)
            np.savez(chosen.folder / "rows.npz", x=held_out[:64])
            more = []
            if name in labels:
                (chosen.folder / "labels.txt").write_text(labels[name] + "\n")
                more = ["--labels", str(chosen.folder / "labels.txt")]
            example = ["--example", str(chosen.folder / "rows.npz"), "--to", str(target)]
            imported = inferpool("import", *given, *example, *more)
            words = labels.get(name, "").split("\n")
            target_values = np.array(words)[held_out_right] if name in labels else held_out_right
            sample = json.loads((target / "samples" / "imported.json").read_text())
            named = {next(iter(sample["inputs"])): held_out, "target": target_values}
            np.savez(chosen.folder / "data.npz", **named)
            data = ["--data", str(chosen.folder / "data.npz")]
            with (target / "model.toml").open("a") as table:
                table.write("\n[versions]\nlabels = {stable = 1}\n")  # what optimise writes serves nobody yet
            evaluated = inferpool("evaluate", str(target), *data)
            optimised = inferpool("optimise", str(target), *data, "--goal", GOALS[name])
            print(imported, evaluated, optimised, sep="\n\n", flush=True)
            with (target / "README.md").open("a") as card:
                card.write(f"\n## On the held-out fifth\n\n```text\n{evaluated}\n```\n")
                card.write(f"\n## Optimised\n\n```text\n{optimised}\n```\n")


if __name__ == "__main__":
    main()
