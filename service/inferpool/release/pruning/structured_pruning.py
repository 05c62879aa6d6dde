# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxscript>=0.5",
#   "torch>=2.9",
#   "torch-pruning>=1.6",
# ]
# ///
"""Removes channels from a network of PyTorch, lets its build script train it on, and writes it as ONNX.

    structured_pruning.py BUILD.py VERSION.onnx ROWS.npz OUT EPOCHS SEED PERCENT…

Imports the build script, which runs its code. For each PERCENT, `OUT/PERCENT/model.onnx` is written, or
`OUT/result.json` has the reason; it also has the versions of the tools. ROWS.npz has the inputs of some rows
as `in:NAME`, and what the version answers to them as `out:NAME`. Torch-Pruning finds the layers that depend
on each other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch_pruning

sys.path.append(str(Path(__file__).parents[1] / "importers"))
from torch_export import as_arrays, export_module

del sys.path[-1]

Array: TypeAlias = npt.NDArray[Any]

STATED_DIFFERENCE: Final = 1e-3
"""Of the largest answer: `load_network` returns another network if its answers differ by more."""
WIDTH: Final = 16
"""Channels that one instruction computes: 24 take longer than 32 in convolutions of ONNX Runtime."""
_TOOLS: Final = ("torch", "torch-pruning", "onnx")
_FUNCTIONS: Final = ("load_network", "fine_tune")


class Version:
    """The version that is pruned.

    Attributes:
        folder: the folder with its file.
        inputs: the names of its inputs, in its file's order.
        outputs: the names of its outputs, in its file's order.
        varying: for each input, the dimensions after the first that may have any size.
        rows: the inputs of some rows, by name.
        answers: what it answers to `rows`, by name.
    """

    def __init__(self, file: Path, rows: Path) -> None:
        self.folder = file.parent
        graph = onnx.load(file, load_external_data=False).graph
        inputs = inputs_of(graph)
        self.inputs = [each.name for each in inputs]
        self.outputs = [each.name for each in graph.output]
        self.varying = {
            each.name: [
                at for at, size in enumerate(each.type.tensor_type.shape.dim) if at and not size.dim_value
            ]
            for each in inputs
        }
        with np.load(rows, allow_pickle=False) as loaded:
            self.rows = {name: loaded[f"in:{name}"] for name in self.inputs}
            self.answers = {name: loaded[f"out:{name}"] for name in self.outputs}


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs of a graph; old files list their weights among them."""
    constants = {tensor.name for tensor in graph.initializer}
    return [each for each in graph.input if each.name not in constants]


class InOrder(torch.nn.Module):  # type: ignore[misc]  # the package has no types here
    """A network whose inputs are given in order, whatever their names are there."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return what the network answers to `inputs`."""
        return self.network(*inputs)


def main(script: Path, version: Version, out: Path, epochs: int, seed: int, percents: list[int]) -> None:
    """Make each form; whatever fails, the reason is in `result.json`."""
    torch.use_deterministic_algorithms(True)
    failures = {}
    for percent in percents:
        try:
            build = import_script(script)
            folder = out / str(percent)
            folder.mkdir()
            make(build, version, folder, epochs, seed, percent / 100)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the code of others raises anything, and may exit
            text = " ".join(str(error).split())[:400]
            failures[percent] = text if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
    tools = {name: importlib.metadata.version(name) for name in _TOOLS}
    (out / "result.json").write_text(json.dumps({"failures": failures, "tools": tools}))


def import_script(file: Path) -> ModuleType:
    """Import a build script anew; exits if it has not the functions that are needed."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        sys.exit(f"{file.name} is no module of Python")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # its own imports
    imported = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = imported
    spec.loader.exec_module(imported)
    missing = [name for name in _FUNCTIONS if not callable(getattr(imported, name, None))]
    if missing:
        sys.exit(f"{file.name} has no function {' and no function '.join(missing)}")
    return imported


def make(build: ModuleType, version: Version, folder: Path, epochs: int, seed: int, share: float) -> None:
    """Prune, train on and export one form; exits with a message if that cannot be done."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    network = build.load_network(version.folder)
    if not isinstance(network, torch.nn.Module):
        sys.exit(f"load_network returns a {type(network).__name__}, not a torch.nn.Module")
    rows = tuple(torch.from_numpy(version.rows[name]) for name in version.inputs)
    check_same(answers(network.eval(), rows), version)
    remove_channels(network, rows, share)
    torch.manual_seed(seed)
    build.fine_tune(network.train(), epochs, seed)
    network.to("cpu").eval()
    if callable(getattr(build, "export_network", None)):
        build.export_network(network, folder / "model.onnx")
    else:
        export_module(
            InOrder(network), version.rows, version.outputs, folder, varying=version.varying, in_order=True
        )
    made = onnx.load(folder / "model.onnx")
    if len(list(folder.iterdir())) > 1:
        onnx.save(made, folder / "model.onnx")  # a form is one file
    named = [each.name for each in inputs_of(made.graph)], [each.name for each in made.graph.output]
    if named != (version.inputs, version.outputs):
        sys.exit(f"the exported file has inputs and outputs {named}, not {version.inputs, version.outputs}")


def answers(network: torch.nn.Module, rows: tuple[torch.Tensor, ...]) -> list[Array]:
    """Return what the network answers, in its order."""
    with torch.no_grad():
        return list(as_arrays(network(*rows)).values())


def check_same(found: list[Array], version: Version) -> None:
    """Exit if the network is not the version's."""
    expected = list(version.answers.values())
    if [each.shape for each in found] != [each.shape for each in expected]:
        sys.exit(
            f"load_network's outputs are of {[each.shape for each in found]}, those of version"
            f" {version.folder.name} of {[each.shape for each in expected]}"
        )
    for own, other in zip(found, expected, strict=True):
        difference = float(np.abs(own - other).max(initial=0))
        if not difference <= STATED_DIFFERENCE * max(1.0, float(np.abs(other).max(initial=0))):
            sys.exit(
                f"load_network's answers differ from version {version.folder.name}'s by {difference:.3g}"
            )


def remove_channels(network: torch.nn.Module, rows: tuple[torch.Tensor, ...], share: float) -> None:
    """Remove the `share` of each layer's channels whose weights are smallest, with all that depends on them.

    What stays is rounded up to a multiple of `WIDTH`. The layers that make the outputs keep their channels.
    Exits if nothing can be removed.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # the graph is found by gradients
    before = [each.shape for each in answers(network, rows)]
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=rows)
    ratios, kept = {}, []
    for group in graph.get_all_groups():
        layer = group[0].dep.target.module
        channels = graph.get_out_channels(layer)
        staying = math.ceil(channels * (1 - share) / WIDTH) * WIDTH
        if staying < channels and not _reaches_output(graph, group):
            ratios[layer] = 1 - (staying + 0.5) / channels  # the pruner rounds what stays down
        else:
            kept.append(layer)
    if not ratios:
        sys.exit(f"no layer has channels to spare; those that stay are multiples of {WIDTH}")
    torch_pruning.pruner.BasePruner(
        network,
        rows,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio_dict=ratios,
        ignored_layers=kept,
        root_module_types=[torch_pruning.ops.TORCH_CONV, torch_pruning.ops.TORCH_LINEAR],
    ).step()
    if [each.shape for each in answers(network, rows)] != before:
        sys.exit("without some channels the outputs have other shapes")


def _reaches_output(graph: Any, group: Any) -> bool:
    """Whether channels of the group are channels of an output of the network."""
    for dep, _ in group:
        pruner = graph.get_pruner_of_module(dep.target.module)
        consumed = dep.handler == pruner.prune_in_channels != pruner.prune_out_channels
        if not dep.target.outputs and not consumed:
            return True
    return False


if __name__ == "__main__":
    script, file, rows, out, *numbers = sys.argv[1:]
    del sys.argv[1:]  # they are not for the build script
    epochs, seed, *percents = map(int, numbers)
    main(Path(script), Version(Path(file), Path(rows)), Path(out), epochs, seed, percents)
