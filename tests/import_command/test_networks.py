"""Models of Keras and modules of PyTorch, for any number of rows."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from tests.record import needs_to_run

needs_to_run("frameworks", whole_module=True)

import numpy as np
import onnx
import pytest
import torch

from tests.import_command.scripts import difference, script

pytestmark = pytest.mark.filterwarnings("ignore")  # of Keras and PyTorch about themselves


def test_keras_keeps_names_channels_and_several_inputs_and_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = script("keras_model", monkeypatch).main  # it chooses the backend
    import keras

    image, area = keras.Input((8, 8, 1), name="image"), keras.Input((1,), name="area")
    seen = keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(image))
    both = keras.layers.Concatenate()([seen, area])
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(keras.layers.Dropout(0.5)(both))
    price = keras.layers.Dense(1, name="price")(both)
    keras.Model([image, area], [kind, price]).save(tmp_path / "house.keras")
    source = np.random.default_rng(0)
    np.savez(tmp_path / "example.npz", area=source.random((5, 1)), image=source.random((5, 8, 8, 1)))
    convert(tmp_path / "house.keras", tmp_path / "example.npz", tmp_path)
    assert difference(tmp_path) < 1e-5
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {
        each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.output)
    }
    assert shapes == {
        "image": ["rows", 8, 8, 1], "area": ["rows", 1], "kind": ["rows", 3], "price": ["rows", 1]
    }  # fmt: skip
    about = json.loads((tmp_path / "imported.json").read_text())
    assert (about["scores"], about["activation"]) == ("kind", "none")
    np.savez(tmp_path / "example.npz", area=np.zeros((5, 1)))
    with pytest.raises(SystemExit, match="the model takes image, area; the example has area"):
        convert(tmp_path / "house.keras", tmp_path / "example.npz", tmp_path)


def test_a_layer_of_strings_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = script("keras_files", monkeypatch).load_model
    with zipfile.ZipFile(tmp_path / "text.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"layers": [{"class_name": "TextVectorization"}]}))
    with pytest.raises(SystemExit, match="the layer TextVectorization takes strings"):
        load(tmp_path / "text.keras")
    (tmp_path / "no.h5").write_bytes(b"no model")
    with pytest.raises(SystemExit, match="Keras cannot load it"):
        load(tmp_path / "no.h5")


MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 4)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, tokens, age, scale=1.0):
        return {"kind": self.head(torch.cat([self.words(tokens).mean(1), age], 1)) * scale}

def build():
    return Net()
"""


def test_a_function_and_weights_become_a_model_of_any_number_of_rows_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = script("torch_module", monkeypatch).main
    (tmp_path / "net_of_a_test.py").write_text(MODULE)
    source = f"{tmp_path / 'net_of_a_test.py'}:build"
    names: dict[str, object] = {}
    exec(MODULE, names)
    state = names["build"]().state_dict()  # type: ignore[operator]
    state["head.bias"][:] = torch.tensor([1.0, 2.0, 3.0])
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    tokens = np.random.default_rng(0).integers(0, 50, (1, 6))
    np.savez(tmp_path / "example.npz", tokens=tokens, age=np.array([[0.5]]))
    convert(source, tmp_path / "example.npz", tmp_path, tmp_path / "weights.pt")
    assert difference(tmp_path) < 1e-5
    [words, _] = onnx.load(tmp_path / "model.onnx").graph.input
    assert [bool(size.dim_param) for size in words.type.tensor_type.shape.dim] == [True, True]
    torch.save({"head.bias": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match=r"weights\.pt does not fit the module: .*Missing key"):
        convert(source, tmp_path / "example.npz", tmp_path, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match="it has weights without the module: import FILE"):
        convert(str(tmp_path / "weights.pt"), tmp_path / "example.npz", tmp_path, None)
