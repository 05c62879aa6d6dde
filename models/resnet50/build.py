# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "torch==2.13.0",  # the one that the tests run with
#   "tqdm>=4",
# ]
# ///
"""Turn torchvision's ResNet-50 weights into a served folder.

    inferpool build resnet50 --weights resnet50-0676ba61.pth
    inferpool build resnet50 --random-weights

The file is the state dict that torchvision publishes, or any other of the same network. It is read without
running anything in it. The network here is torchvision's, layer by layer and name by name; what is served is
the same as an ONNX graph, in which each batch normalisation has become part of the convolution before it.
Nothing is written where ONNX Runtime answers otherwise than PyTorch does, by more than `STATED_DIFFERENCE`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final, TypeAlias


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(
        prog="build.py", description="Turn torchvision's ResNet-50 weights into a served folder."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, metavar="FILE", help="a state dict of torchvision's resnet50")
    source.add_argument(
        "--random-weights",
        action="store_true",
        help="weights that mean nothing, to measure speed with: the answers are noise",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="model folder to write into (default: the one this script is in)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of weights and noise (default: 0)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    # Before anything is imported that must be installed: help and mistakes need none of it.
    read_options()

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from tqdm import tqdm

Array: TypeAlias = npt.NDArray[Any]
Weights: TypeAlias = dict[str, torch.Tensor]

STATED_DIFFERENCE: Final = 1e-4
"""Of the largest logit; a convolution's sums are rounded in another order by another library."""
BLOCKS: Final = (3, 4, 6, 3)
CLASSES: Final = 1000
SIDE: Final = 224
TRIED_ROWS: Final = 4


class Bottleneck(nn.Module):
    """1×1, 3×3 (which strides) and 1×1 convolutions, added to what came in: torchvision's "ResNet V1.5"."""

    def __init__(self, came: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(came, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or came != 4 * width:
            shorter = nn.Conv2d(came, 4 * width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shorter, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, came, height, width] to [rows, 4 × width, height / stride, width / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """torchvision's `resnet50`: a state dict of the one is a state dict of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        came = 64
        for stage, blocks in enumerate(BLOCKS, start=1):
            width = 32 * 2**stage
            layer = OrderedDict[str, nn.Module]()
            for block in range(blocks):
                layer[str(block)] = Bottleneck(came, width, 2 if block == 0 and stage > 1 else 1)
                came = 4 * width
            self.add_module(f"layer{stage}", nn.Sequential(layer))
        self.fc = nn.Linear(came, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 3, 224, 224] to logits [rows, 1000]."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 1 + len(BLOCKS)):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def random_weights(seed: int) -> Weights:
    """A state dict of numbers that mean nothing and keep every activation within sight of 1."""
    draw = np.random.default_rng(seed)
    weights = {}
    for name, tensor in ResNet50().state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            array: Array = np.array(0)
        elif len(shape) > 1:
            array = draw.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith("running_var"):
            array = draw.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name.endswith("weight"):
            # What is added to the residual stream is small, or sixteen blocks would double it sixteen times.
            most = 0.3 if name.endswith("bn3.weight") else 1.0
            array = draw.uniform(most / 2, most, shape).astype(np.float32)
        else:
            array = draw.standard_normal(shape, np.float32) * np.float32(0.1)
        weights[name] = torch.from_numpy(array)
    return weights


def read_weights(file: Path) -> Weights:
    """Read a state dict; nothing in the file is executed.

    Raises SystemExit, with what is wrong, if it is anything else or of another network.
    """
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a file that is none makes PyTorch raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(f"{file}: cannot be read as a state dict: {why}") from None
    if not isinstance(weights, dict):
        raise SystemExit(f"{file}: is a {type(weights).__name__}, not a state dict")
    wanted = ResNet50().state_dict()
    for name, tensor in wanted.items():
        got = weights.get(name)
        if name.endswith("num_batches_tracked"):  # older files have none, and inference needs none
            weights.setdefault(name, tensor)
        elif not isinstance(got, torch.Tensor):
            raise SystemExit(f"{file}: is not a ResNet-50 of torchvision: it has no {name}")
        elif got.shape != tensor.shape:
            raise SystemExit(f"{file}: {name} is {list(got.shape)}, ResNet-50's is {list(tensor.shape)}")
        elif not torch.isfinite(got).all():
            raise SystemExit(f"{file}: {name} has numbers that are not finite")
    unknown = sorted(weights.keys() - wanted.keys(), key=str)
    if unknown:
        raise SystemExit(f"{file}: is not a ResNet-50 of torchvision: it also has {unknown[0]}")
    return {name: weights[name].to(tensor.dtype) for name, tensor in wanted.items()}


class Graph:
    """An ONNX graph as it grows; its tensors are called as the layers that give them."""

    def __init__(self, weights: Weights) -> None:
        self._weights = {name: tensor.double().numpy() for name, tensor in weights.items()}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, kind: str, out: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; returns the name of what it gives."""
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def constant(self, name: str, array: Array) -> str:
        """Add an array as FP32."""
        self.initializers.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, x: str, conv: str, norm: str, stride: int = 1) -> str:
        """Add a convolution with the batch normalisation that follows it folded in, in double precision."""
        kernel = self._weights[f"{conv}.weight"]
        gain = self._weights[f"{norm}.weight"] / np.sqrt(self._weights[f"{norm}.running_var"] + 1e-5)
        bias = self._weights[f"{norm}.bias"] - gain * self._weights[f"{norm}.running_mean"]
        side = kernel.shape[-1]
        return self.add(
            "Conv",
            conv,
            x,
            self.constant(f"{conv}.weight", kernel * gain[:, None, None, None]),
            self.constant(f"{conv}.bias", bias),
            kernel_shape=[side, side],
            strides=[stride, stride],
            pads=[side // 2] * 4,
        )

    def relu(self, x: str) -> str:
        """Add a rectifier."""
        return self.add("Relu", f"{x}.relu", x)

    def linear(self, x: str, layer: str, out: str) -> str:
        """Add a dense layer."""
        weight, bias = (
            self.constant(f"{layer}.{name}", self._weights[f"{layer}.{name}"]) for name in ("weight", "bias")
        )
        return self.add("Gemm", out, x, weight, bias, transB=1)


def to_onnx(weights: Weights) -> onnx.ModelProto:
    """Write the network down as an ONNX graph: `image` [-1, 3, 224, 224] in, `logits` [-1, 1000] out."""
    graph = Graph(weights)
    x = graph.relu(graph.conv("image", "conv1", "bn1", stride=2))
    x = graph.add("MaxPool", "maxpool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, blocks in enumerate(BLOCKS, start=1):
        for number in range(blocks):
            block = f"layer{stage}.{number}"
            stride = 2 if number == 0 and stage > 1 else 1
            y = graph.relu(graph.conv(x, f"{block}.conv1", f"{block}.bn1"))
            y = graph.relu(graph.conv(y, f"{block}.conv2", f"{block}.bn2", stride))
            y = graph.conv(y, f"{block}.conv3", f"{block}.bn3")
            if number == 0:
                x = graph.conv(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = graph.relu(graph.add("Add", block, y, x))
    x = graph.add("Flatten", "flatten", graph.add("GlobalAveragePool", "avgpool", x))
    graph.linear(x, "fc", "logits")
    described = helper.make_graph(
        graph.nodes,
        "resnet50",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", CLASSES])],
        graph.initializers,
    )
    model = helper.make_model(
        described, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="inferpool"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(model: onnx.ModelProto, weights: Weights, seed: int) -> tuple[float, Array, Array]:
    """Run noise through PyTorch and ONNX Runtime.

    Returns the largest difference of a logit, as a part of the largest logit, the rows and ONNX's logits.
    """
    network = ResNet50().eval()
    network.load_state_dict(weights)
    # To two decimals, so that a golden sample of them is not three times as long.
    noise = np.random.default_rng(seed).standard_normal((TRIED_ROWS, 3, SIDE, SIDE))
    rows = noise.round(2).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    eager, served = [], []
    with torch.inference_mode():
        for row in tqdm(rows, desc="comparing", unit="row"):
            eager.append(network(torch.from_numpy(row[np.newaxis])).numpy())
            served.append(session.run(["logits"], {"image": row[np.newaxis]})[0])
    expected, logits = np.concatenate(eager), np.concatenate(served)
    return float(np.abs(logits - expected).max() / np.abs(expected).max()), rows, logits


def write(out: Path, model: onnx.ModelProto, rows: Array, logits: Array, evaluation: dict[str, Any]) -> None:
    """Write version 1 with its evaluation, a golden sample, and what the server needs beside them."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (version / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    golden = {
        "inputs": {"image": rows[:1].astype(float).round(2).tolist()},
        "outputs": {"logits": logits[:1].astype(float).round(6).tolist()},
        "tolerance": float(10 * STATED_DIFFERENCE * np.abs(logits).max()),
    }
    (samples / "noise.json").write_text(json.dumps(golden) + "\n")
    here = Path(__file__).parent
    for name in ("model.toml", "labels.txt"):
        if out.resolve() != here.resolve():
            shutil.copyfile(here / name, out / name)


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()

    weights = random_weights(options.seed) if options.random_weights else read_weights(options.weights)
    model = to_onnx(weights)
    difference, rows, logits = compare(model, weights, options.seed)
    print(f"ONNX Runtime and PyTorch differ by {difference:.1e} of the largest logit, over {len(rows)} rows")
    # Written so that what is not a number does not pass.
    if not difference <= STATED_DIFFERENCE:
        print(f"not written: the card states at most {STATED_DIFFERENCE:g}", file=sys.stderr)
        return 1
    made_from = "random weights" if options.random_weights else options.weights.name
    evaluation = {"weights": made_from, "difference": difference, "rows": len(rows), "seed": options.seed}
    write(options.out, model, rows, logits, evaluation)
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
