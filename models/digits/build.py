# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "pillow>=11",
#   "scikit-learn>=1.6",
#   "torch==2.13.0",  # the one that the tests run with
#   "tqdm>=4",
# ]
# ///
"""Train, evaluate and export the digits model: from scikit-learn's scans to a folder that is served.

    inferpool build digits [--out DIR] [--seed N]

A small convolutional network learns four fifths of the 1,797 scanned digits (Alpaydin and Kaynak's
"Optical Recognition of Handwritten Digits", bundled with scikit-learn), is written as an ONNX file, and that
file, run by ONNX Runtime, is judged on the fifth it has never seen. Nothing is written where it is less than
`STATED_ACCURACY` right.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(description="Train, evaluate and export the digits model.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="model folder to write into (default: the one this script is in)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    # Before anything is imported that must be installed: help and mistakes need none of it.
    read_options()

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

Array: TypeAlias = npt.NDArray[Any]

STATED_ACCURACY: Final = 0.98
FULL_INK: Final = 16
SPLIT_SEED: Final = 0
EPOCHS: Final = 60
BATCH_ROWS: Final = 64
SAMPLE_ROWS: Final = 3


def split() -> tuple[Array, Array, Array, Array]:
    """Return the training and the held-out part: images, held-out images, labels, held-out labels.

    Images are n×8×8 integers from 0 (paper) to 16 (full ink). The split is stratified, and the same
    whatever the seed of the training is, so that two builds can be compared.
    """
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    training_images, held_out_images, training_labels, held_out_labels = parts
    return training_images, held_out_images, training_labels, held_out_labels


def held_out() -> tuple[Array, Array]:
    """Return the fifth that the model has never seen: images (n×8×8, 0..16) and labels (n)."""
    _, images, _, labels = split()
    return images, labels


def to_rows(images: Array) -> Array:
    """Turn n×8×8 integers 0..16 into what the model takes: n×1×8×8 of FP32, 1.0 is full ink."""
    return (images[:, np.newaxis] / FULL_INK).astype(np.float32)


def to_picture(image: Array) -> Image.Image:
    """Turn one 8×8 of 0..16 into an 8-bit grey picture, white ink on black."""
    return Image.fromarray(np.round(image * (255 / FULL_INK)).astype(np.uint8))


def new_network() -> torch.nn.Sequential:
    """Return the network with weights of chance."""
    # Not at the top: whoever wants the held-out fifth alone needs no torch.
    from torch import nn

    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(1, 16, 3, padding=1))
    network.add_module("relu1", nn.ReLU())
    network.add_module("conv2", nn.Conv2d(16, 32, 3, padding=1))
    network.add_module("relu2", nn.ReLU())
    network.add_module("pool", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    network.add_module("dropout", nn.Dropout(0.3))
    network.add_module("dense1", nn.Linear(32 * 4 * 4, 64))
    network.add_module("relu3", nn.ReLU())
    network.add_module("dense2", nn.Linear(64, 10))
    return network


def train(images: Array, labels: Array, seed: int) -> dict[str, Array]:
    """Train the network and return its weights by name, as arrays; the same seed gives the same weights."""
    import torch

    torch.manual_seed(seed)
    network = new_network()
    learn(network, images, labels, EPOCHS, rate=4e-3)
    return weights_of(network)


def weights_of(network: torch.nn.Module) -> dict[str, Array]:
    """Return the weights by name, as arrays."""
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def learn(network: torch.nn.Module, images: Array, labels: Array, epochs: int, rate: float) -> None:
    """Train a network in place, at learning rates of at most `rate`."""
    import torch
    from torch import nn

    torch.set_num_threads(1)  # a sum split over threads is rounded differently on each machine
    torch.use_deterministic_algorithms(True)
    rows, targets = torch.from_numpy(to_rows(images)), torch.from_numpy(labels)
    steps_per_epoch = -(-len(rows) // BATCH_ROWS)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, epochs=epochs, steps_per_epoch=steps_per_epoch
    )
    bar = tqdm(range(epochs), desc="training", unit="epoch")
    for _ in bar:
        total_loss = 0.0
        for picked in torch.randperm(len(rows)).split(BATCH_ROWS):
            logits = network(shifted(rows[picked]))
            loss = nn.functional.cross_entropy(logits, targets[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(picked)
        bar.set_postfix(loss=f"{total_loss / len(rows):.4f}")


def load_network(version: Path) -> torch.nn.Module:
    """Return the network of a version, a folder, for `inferpool optimise --fine-tune`."""
    import torch

    network = new_network()
    stored = onnx.load(version / "model.onnx").graph.initializer
    network.load_state_dict(
        {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in stored}
    )
    return network


def fine_tune(network: torch.nn.Module, epochs: int, seed: int) -> None:
    """Train a network without some of its channels on the training part, at half the usual rate."""
    import torch

    if epochs:
        images, _, labels, _ = split()
        torch.manual_seed(seed)
        learn(network, images, labels, epochs, rate=2e-3)


def export_network(network: torch.nn.Module, file: Path) -> None:
    """Write a network as ONNX."""
    file.write_bytes(to_onnx(weights_of(network)).SerializeToString())


def shifted(rows: torch.Tensor) -> torch.Tensor:
    """Move the whole batch by up to half a pixel each way: scans are never quite centred."""
    import torch

    across, down = (torch.rand(2) - 0.5).tolist()
    # affine_grid measures in units in which the picture is 2 wide: a pixel, of 8, is 1/4.
    move = torch.tensor([[1.0, 0.0, across / 4], [0.0, 1.0, down / 4]]).expand(len(rows), 2, 3)
    grid = torch.nn.functional.affine_grid(move, list(rows.shape), align_corners=False)
    return torch.nn.functional.grid_sample(rows, grid, align_corners=False)


def to_onnx(weights: dict[str, Array]) -> onnx.ModelProto:
    """Write the network down as an ONNX graph: `image` [-1, 1, 8, 8] in, `logits` [-1, 10] out."""
    nodes = [
        helper.make_node("Conv", ["image", "conv1.weight", "conv1.bias"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "conv2.weight", "conv2.bias"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("MaxPool", ["r2"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "dense1.weight", "dense1.bias"], ["d1"], transB=1),
        helper.make_node("Relu", ["d1"], ["r3"]),
        helper.make_node("Gemm", ["r3", "dense2.weight", "dense2.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    # Format 8 and opset 17 are the oldest pair that says all this: any ONNX Runtime since 1.12 reads it.
    model = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="inferpool"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, rows: Array) -> Array:
    """Compute the logits of `rows` with ONNX Runtime, as the server will."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: Array = session.run(["logits"], {"image": rows})[0]
    return logits


def clearest(digit: int, labels: Array, logits: Array) -> int:
    """Return the index of the row of this digit that the model tells best from the other nine."""
    others = np.delete(logits, digit, axis=1).max(axis=1)
    margin = np.where(labels == digit, logits[:, digit] - others, -np.inf)
    return int(margin.argmax())


def write(out: Path, model: onnx.ModelProto, images: Array, labels: Array, logits: Array) -> None:
    """Write version 1, the labels, the golden samples and a picture to try it with."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (out / "labels.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    golden = {
        "inputs": {"image": to_rows(images[:SAMPLE_ROWS]).tolist()},
        "outputs": {"logits": np.round(logits[:SAMPLE_ROWS].astype(float), 6).tolist()},
        "tolerance": 1e-4,
    }
    (samples / "held_out.json").write_text(json.dumps(golden) + "\n")
    to_picture(images[clearest(7, labels, logits)]).save(samples / "7.png")


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()

    training_images, images, training_labels, labels = split()
    model = to_onnx(train(training_images, training_labels, options.seed))
    logits = run(model, to_rows(images))
    right = logits.argmax(axis=1) == labels
    print(f"held-out accuracy: {right.mean():.2%} ({right.sum()} of {len(right)})")
    if right.mean() < STATED_ACCURACY:
        print(f"not written: the card states at least {STATED_ACCURACY:.0%}", file=sys.stderr)
        return 1
    write(options.out, model, images, labels, logits)
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
