# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "pillow>=11",
#   "torch==2.13.0",  # the one that the tests run with
#   "tqdm>=4",
# ]
# ///
"""Train, evaluate and export the CIFAR-10 model, from your own copy of the pictures.

    inferpool build cifar10 --data cifar-10-python.tar.gz

The archive is the "python version" that the authors of CIFAR-10 publish, or the folder that it unpacks to;
how it is read without running what is in it stands in `archive.py`. A convolutional network of the size that
tutorials use learns the five training batches, is written as an ONNX file, and that file, run by ONNX
Runtime, is judged on the test batch. Nothing is written where it is less than `STATED_ACCURACY` right.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final, TypeAlias

EPOCHS: Final = 10


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(
        prog="build.py", description="Train, evaluate and export the CIFAR-10 model."
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="cifar-10-python.tar.gz, or the folder cifar-10-batches-py that it unpacks to",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="model folder to write into (default: the one this script is in)",
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, metavar="N", help=f"passes over the data (default: {EPOCHS})"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (default: 0)")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    return options


if __name__ == "__main__":
    # Before anything is imported that must be installed: help and mistakes need none of it.
    read_options()

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

# Beside this script, which is how Python finds it when the script is run.
from archive import PIXELS, SIDE, ArchiveError, read_archive
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from tqdm import tqdm

Array: TypeAlias = npt.NDArray[Any]

STATED_ACCURACY: Final = 0.6
LABELS: Final = tuple((Path(__file__).parent / "labels.txt").read_text().split())
BATCH_ROWS: Final = 32
RUN_ROWS: Final = 1000
SAMPLE_ROWS: Final = 3


def to_rows(images: Array) -> Array:
    """Turn n×3×32×32 bytes into what the model takes: FP32, 1.0 is full light."""
    return (images / 255).astype(np.float32)


def train(images: Array, labels: Array, epochs: int, seed: int) -> dict[str, Array]:
    """Train the network and return its weights by name."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(3, 32, 3))
    network.add_module("relu1", nn.ReLU())
    network.add_module("pool1", nn.MaxPool2d(2))
    network.add_module("conv2", nn.Conv2d(32, 64, 3))
    network.add_module("relu2", nn.ReLU())
    network.add_module("pool2", nn.MaxPool2d(2))
    network.add_module("conv3", nn.Conv2d(64, 64, 3))
    network.add_module("relu3", nn.ReLU())
    network.add_module("flatten", nn.Flatten())
    network.add_module("dense1", nn.Linear(64 * 4 * 4, 64))
    network.add_module("relu4", nn.ReLU())
    network.add_module("dense2", nn.Linear(64, len(LABELS)))

    rows, targets = torch.from_numpy(to_rows(images)), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters())
    steps = -(-len(rows) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, epochs=epochs, steps_per_epoch=steps
    )
    with tqdm(total=epochs * steps, desc="training", unit="batch") as bar:
        for _ in range(epochs):
            for picked in torch.randperm(len(rows)).split(BATCH_ROWS):
                # Half of the pictures in the mirror: what they show stays what it is.
                mirrored = torch.where(
                    torch.rand(len(picked), 1, 1, 1) < 0.5, rows[picked].flip(-1), rows[picked]
                )
                loss = nn.functional.cross_entropy(network(mirrored), targets[picked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def to_onnx(weights: dict[str, Array]) -> onnx.ModelProto:
    """Write the network down as an ONNX graph: `image` [-1, 3, 32, 32] in, `logits` [-1, 10] out."""
    nodes = []
    came = "image"
    for number in (1, 2, 3):
        layer = f"conv{number}"
        nodes.append(helper.make_node("Conv", [came, f"{layer}.weight", f"{layer}.bias"], [layer]))
        nodes.append(helper.make_node("Relu", [layer], [f"relu{number}"]))
        came = f"relu{number}"
        if number < 3:
            pool = f"pool{number}"
            nodes.append(helper.make_node("MaxPool", [came], [pool], kernel_shape=[2, 2], strides=[2, 2]))
            came = pool
    nodes += [
        helper.make_node("Flatten", [came], ["flat"]),
        helper.make_node("Gemm", ["flat", "dense1.weight", "dense1.bias"], ["dense1"], transB=1),
        helper.make_node("Relu", ["dense1"], ["relu4"]),
        helper.make_node("Gemm", ["relu4", "dense2.weight", "dense2.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "cifar10",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", len(LABELS)])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="inferpool"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, images: Array) -> Array:
    """Compute the logits of `images` with ONNX Runtime, as the server will."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [
        session.run(["logits"], {"image": to_rows(images[first : first + RUN_ROWS])})[0]
        for first in range(0, len(images), RUN_ROWS)
    ]
    return np.concatenate(parts)


def write(out: Path, model: onnx.ModelProto, images: Array, logits: Array, facts: dict[str, Any]) -> None:
    """Write version 1 with its evaluation, golden samples, a picture, and what the server needs besides."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (version / "evaluation.json").write_text(json.dumps(facts, indent=1) + "\n")
    golden = {
        "inputs": {"image": to_rows(images[:SAMPLE_ROWS]).tolist()},
        "outputs": {"logits": np.round(logits[:SAMPLE_ROWS].astype(float), 6).tolist()},
        "tolerance": 1e-3,
    }
    (samples / "held_out.json").write_text(json.dumps(golden) + "\n")
    Image.fromarray(images[0].transpose(1, 2, 0)).save(samples / "first.png")
    here = Path(__file__).parent
    for name in ("model.toml", "labels.txt"):
        if out.resolve() != here.resolve():
            shutil.copyfile(here / name, out / name)


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()

    try:
        training_images, images, training_labels, labels = read_archive(options.data, LABELS)
    except ArchiveError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    print(f"{len(training_images)} pictures to learn, {len(images)} held out, {PIXELS} bytes each")
    model = to_onnx(train(training_images, training_labels, options.epochs, options.seed))
    logits = run(model, images)
    right = logits.argmax(axis=1) == labels
    print(f"held-out accuracy: {right.mean():.2%} ({right.sum()} of {len(right)})")
    for index, name in enumerate(LABELS):
        print(f"  {name:<12} {right[labels == index].mean():.2%}" if (labels == index).any() else f"  {name}")
    if right.mean() < STATED_ACCURACY:
        print(f"not written: the card states at least {STATED_ACCURACY:.0%}", file=sys.stderr)
        return 1
    evaluation = {
        "accuracy": float(right.mean()),
        "held_out": len(images),
        "learned_from": len(training_images),
        "epochs": options.epochs,
        "seed": options.seed,
    }
    write(options.out, model, images, logits, evaluation)
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
