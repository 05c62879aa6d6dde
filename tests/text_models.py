"""Small text models that tests and benchmarks make: a Transformer encoder and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from inferpool.tensors import Array
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.onnx_models import write_model

WORDS = [f"w{number}" for number in range(200)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_tokenizer() -> Any:
    """One token a word of `WORDS`, between two tokens of its own."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


class _Graph:
    """An ONNX graph as it grows: `op` adds a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def value(self, value: Any, dtype: type = np.float32) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def random(self, *shape: int) -> str:
        return self.value(self._rng.standard_normal(shape) / np.sqrt(shape[0]))


def write_encoder(
    repository: Path,
    name: str,
    config: str = "[text]\nmax_tokens = 128\n",
    *,
    mask: bool = True,
    layers: int = 1,
    width: int = 16,
    positions: int = 128,
    ids: int = TensorProto.INT64,
    types: int = 0,
    scored: bool = False,
) -> Path:
    """A Transformer encoder with random weights, its tokenizer and `model.toml`; returns the model's file.

    Its outputs are `pooled` [rows, width], the mean over tokens, and `tokens` [rows, tokens, width]. Without
    `mask` it has no such input, and padding goes into both; with `types` it has an input of as many. With
    `scored` the only output is `score` [rows, 1], as cross-encoders have it.
    """
    graph = _Graph()
    one = graph.value([1], np.int64)
    words = graph.value(np.random.default_rng(1).standard_normal((len(SPECIAL) + len(WORDS), width)))
    count = graph.op("Gather", graph.op("Shape", "input_ids"), one)
    places = graph.op("Slice", graph.random(positions, width), graph.value([0], np.int64), count)
    x = graph.op("Add", graph.op("Gather", words, "input_ids"), places)
    if types:
        x = graph.op("Add", x, graph.op("Gather", graph.random(types, width), "token_type_ids"))
    bias = kept = ""
    if mask:
        flags = graph.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        kept = graph.op("Unsqueeze", flags, graph.value([2], np.int64))
        hidden = graph.op("Sub", graph.value(1.0), flags)
        bias = graph.op("Unsqueeze", graph.op("Mul", hidden, graph.value(-1e9)), one)
    norm = graph.value(np.ones(width))
    for _ in range(layers):
        query, key, value = (graph.op("MatMul", x, graph.random(width, width)) for _ in range(3))
        scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1]))
        scores = graph.op("Mul", scores, graph.value(width**-0.5))
        if mask:
            scores = graph.op("Add", scores, bias)
        attended = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
        x = graph.op("LayerNormalization", graph.op("Add", x, attended), norm)
        inner = graph.op("Relu", graph.op("MatMul", x, graph.random(width, 4 * width)))
        x = graph.op("Add", x, graph.op("MatMul", inner, graph.random(4 * width, width)))
    graph.op("LayerNormalization", x, norm, name="tokens")
    if mask:
        total = graph.op("ReduceSum", graph.op("Mul", "tokens", kept), one, keepdims=0)
        graph.op("Div", total, graph.op("ReduceSum", kept, one, keepdims=0), name="pooled")
    else:
        graph.op("ReduceMean", "tokens", axes=[1], keepdims=0, name="pooled")
    outputs: dict[str, list[str | int | None]] = {
        "pooled": ["rows", width],
        "tokens": ["rows", "tokens", width],
    }
    if scored:
        first = graph.op("Gather", "tokens", graph.value(0, np.int64), axis=1)
        graph.op("MatMul", first, graph.random(width, 1), name="score")
        outputs = {"score": ["rows", 1]}
    names = ["input_ids", *["attention_mask"] * mask, *["token_type_ids"] * bool(types)]
    file = write_model(
        repository,
        name,
        helper.make_graph(
            graph.nodes,
            name,
            [helper.make_tensor_value_info(item, ids, ["rows", "tokens"]) for item in names],
            [
                helper.make_tensor_value_info(item, TensorProto.FLOAT, shape)
                for item, shape in outputs.items()
            ],
            graph.weights,
        ),
    )
    (file.parent.parent / "model.toml").write_text(config)
    make_tokenizer().save(str(file.parent.parent / "tokenizer.json"))
    return file


class Alone:
    """The answer of a model written here to one sentence, by ONNX Runtime and the tokenizer by hand."""

    def __init__(self, file: Path, max_tokens: int = 128) -> None:
        self._session = onnxruntime.InferenceSession(file)
        self._inputs = {item.name: item.type for item in self._session.get_inputs()}
        self._tokenizer = make_tokenizer()
        self._tokenizer.enable_truncation(max_tokens)

    def inputs(self, sentence: str) -> dict[str, Array]:
        """The tensors of one sentence."""
        ids = self._tokenizer.encode(sentence).ids
        dtype = np.int64 if self._inputs["input_ids"] == "tensor(int64)" else np.int32
        tensors = {"input_ids": np.array([ids], dtype), "attention_mask": np.ones((1, len(ids)), dtype)}
        return {name: tensors[name] for name in self._inputs}

    def __call__(self, sentence: str) -> dict[str, Array]:
        outputs = [item.name for item in self._session.get_outputs()]
        return dict(zip(outputs, self._session.run(outputs, self.inputs(sentence)), strict=True))
