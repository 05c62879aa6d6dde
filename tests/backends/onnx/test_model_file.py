"""The graph of a model file is read without its weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from inferpool.backends.onnx.model_file import graph_operations, graph_values
from onnx import helper

from tests.onnx_models import constant, model, save, value

READ = """
import sys
from pathlib import Path
from inferpool.backends.onnx.model_file import graph_operations
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
assert graph_operations(Path(sys.argv[1])) == {"Add"}
print(peak() - before)
"""


def test_the_weights_of_a_model_take_no_memory_while_its_operations_are_read(tmp_path: Path) -> None:
    weights = [constant(f"w{number}", "FP32", np.ones(2**18, np.float32)) for number in range(32)]
    nodes = [helper.make_node("Add", ["x", f"w{number}"], [f"y{number}"]) for number in range(32)]
    built = model(nodes, [value("x", "FP32", [2**18])], [value("y0", "FP32", [2**18])], weights)
    file = save(built, tmp_path)
    ran = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 4096, "KiB of 32 MiB"


def test_operations_are_found_in_a_branch_with_weights_of_its_own(tmp_path: Path) -> None:
    weight = np.ones(2**16, np.float32)
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["z"]), helper.make_node("Unique", ["z"], ["u"])],
        "inner",
        [],
        [value("u", "FP32", None)],
        [constant("w", "FP32", weight)],
    )
    nodes = [
        helper.make_node("Constant", [], ["k"], value=constant("k", "FP32", weight)),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    whole = model(nodes, [value("c", "BOOL", []), value("x", "FP32", [1])], [value("y", "FP32", None)])
    file = save(whole, tmp_path, "branch.onnx")
    assert graph_operations(file) == {"Add", "Constant", "If", "Unique"}
    assert [(each.name, each.element, each.ranked) for each in graph_values(file)] == [
        ("c", 9, True),
        ("x", 1, True),
        ("y", 1, False),
    ]
