# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxscript>=0.5",
#   "pillow>=11",
#   "torch==2.13.0",
#   "transformers>=5.20,<6",
# ]
# ///
"""Converts a folder of Hugging Face to ONNX: config.json, model.safetensors and tokenizer.json.

    hugging_face.py FOLDER EXAMPLE.npz OUT [--cache]

The example has texts, or two texts a row, or pictures: uint8 [rows, height, width, 3]. The model is compared
with its own code, each row alone, from the text on. Nothing is fetched, and no code of the folder is run.
With `--cache`, a causal language model takes tokens and its cache, and returns the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from conversion import Array, read_arrays, write_about
from hugging_face_cache import LEAST_TOKENS, NOTES, Cached, answer_with_cache
from hugging_face_cache import MOST_ROWS as MOST_CACHED_ROWS
from hugging_face_folder import Folder, FolderError, make_tables, read_folder
from torch_export import export_module

CLASSES = {
    "text classification": "AutoModelForSequenceClassification",
    "image classification": "AutoModelForImageClassification",
    "token classification": "AutoModelForTokenClassification",
    "question answering": "AutoModelForQuestionAnswering",
    "next token": "AutoModelForCausalLM",
    "embeddings": "AutoModel",
}
TOKEN_OUTPUTS = ("token classification", "question answering")
MOST_ROWS = 64
"""Rows that are compared if an output has a dimension of tokens: a client sends so many in one request."""
EXAMPLE_TOKENS = 9
"""Tokens of the rows that the exporter sees; the model takes any number."""


class Exported(torch.nn.Module):  # type: ignore[misc]  # mypy does not read torch
    """The model with one tensor for each answer: pooled vectors, or the scores behind the last token."""

    def __init__(self, model: torch.nn.Module, found: Folder, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.task, self.inputs = model, found.task, list(inputs)
        self.pooling, self.normalize = found.pooling, found.normalize

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs that `names` names; the tensors are those of `inputs`, in order."""
        inputs = dict(zip(self.inputs, tensors, strict=True))
        if self.task == "image classification":
            return (self.model(**inputs).logits,)
        mask = inputs["attention_mask"]
        if self.task == "next token":
            answered = self.model(**inputs, use_cache=False)
            return (pick_last(answered.logits, mask),)
        answered = self.model(**inputs)
        if self.task == "embeddings":
            vectors = pool(answered.last_hidden_state, mask, self.pooling)
            return (torch.nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors,)
        if self.task == "question answering":
            return answered.start_logits, answered.end_logits
        return (answered.logits,)

    def names(self) -> list[str]:
        """The names of the outputs."""
        if self.task == "question answering":
            return ["start_logits", "end_logits"]
        return ["embedding" if self.task == "embeddings" else "logits"]


def pick_last(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what [rows, tokens, …] has at the last token of each row."""
    last = (mask.sum(1) - 1).clamp(min=0)
    return values.gather(1, last[:, None, None].expand(-1, 1, values.shape[-1]))[:, 0]


def pool(values: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Make one vector a row of [rows, tokens, width]."""
    if pooling == "first":
        return values[:, 0]
    if pooling == "last":
        return pick_last(values, mask)
    weights = mask[:, :, None].to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def main(source: Path, example: Path, out: Path, *, cached: bool = False) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    try:
        found = read_folder(source)
    except FolderError as error:
        sys.exit(str(error))
    if cached and found.task != "next token":
        sys.exit(f"--cache is for causal language models; this is one for {found.task}")
    model = load(source, found)
    arrays = read_arrays(example)
    if cached:
        convert_with_cache(model, found, load_tokenizer(source), read_texts(arrays), out)
        return
    notes, pairs = list(found.notes), False
    if found.task == "image classification":
        inputs = {"pixel_values": prepare_pictures(source, arrays)}
        rows = [{"pixel_values": row[None]} for row in inputs["pixel_values"]]
        traced = inputs
        notes.append("The answers are compared from the prepared pictures on, not from files.")
    else:
        texts = read_texts(arrays)
        if found.task in TOKEN_OUTPUTS:
            texts = texts[:MOST_ROWS]
        pairs = texts.ndim == 2
        if found.task == "question answering" and not pairs:
            sys.exit("expected two columns in the example: the question and its context")
        tokenizer = load_tokenizer(source)
        inputs, rows = {"text": texts}, [tokenize(tokenizer, row, found.max_tokens) for row in texts.tolist()]
        # Ids that any model has, of rows whose lengths differ.
        traced = {name: np.full((2, EXAMPLE_TOKENS), int(name != "token_type_ids")) for name in rows[0]}
        traced["attention_mask"][1, -2:] = 0
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    module = Exported(model, found, list(traced)).eval()
    outputs = answer(module, rows)
    varying = {name: [1] for name in traced if name != "pixel_values"}
    export_module(module, traced, module.names(), out, varying=varying, in_order=True)
    classes, activation = found.classes, found.activation
    if found.task == "token classification":
        notes.append(f"The last dimension of `logits` is {', '.join(classes)}.")
        classes = ()
    elif found.task == "next token":
        classes, activation = token_texts(tokenizer, outputs["logits"].shape[1]), "softmax"
    write_about(
        out, inputs, outputs, framework=f"transformers {transformers.__version__}",
        converter=f"torch.onnx of torch {torch.__version__}", kind=f"{found.kind} ({found.task})",
        classes=classes or None, scores="logits" if classes else None, activation=activation,
        tables=make_tables(found, pairs=pairs), licence=found.licence, notes=notes,
    )  # fmt: skip


def convert_with_cache(
    model: torch.nn.Module, found: Folder, tokenizer: Any, texts: Array, out: Path
) -> None:
    """Convert a causal language model that takes tokens and its cache, and returns the cache."""
    if texts.ndim != 1:
        sys.exit("expected one column of texts in the example")
    rows = [tokenize(tokenizer, text, found.max_tokens)["input_ids"][0] for text in texts.tolist()]
    rows = [row for row in rows if len(row) >= LEAST_TOKENS][:MOST_CACHED_ROWS]
    if not rows:
        sys.exit(f"expected texts of {LEAST_TOKENS} tokens or more in the example")
    inputs, outputs, traced = answer_with_cache(model.eval(), rows)
    varying = {name: [1] if name == "input_ids" else [2] for name in traced}
    export_module(Cached(model).eval(), traced, list(outputs), out, varying=varying, in_order=True)
    write_about(
        out, inputs, outputs, framework=f"transformers {transformers.__version__}",
        converter=f"torch.onnx of torch {torch.__version__}", kind=f"{found.kind} ({found.task}, with cache)",
        classes=token_texts(tokenizer, outputs["logits"].shape[1]), scores="logits", activation="softmax",
        licence=found.licence, notes=[*found.notes, *NOTES],
    )  # fmt: skip


def load(source: Path, found: Folder) -> torch.nn.Module:
    """Load the model from its safetensors in FP32, without running code of the folder."""
    try:
        model: torch.nn.Module = getattr(transformers, CLASSES[found.task]).from_pretrained(
            str(source.absolute()), local_files_only=True, trust_remote_code=False, use_safetensors=True,
            attn_implementation="eager", dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  # whatever transformers raises, the model cannot be read
        sys.exit(f"transformers cannot load it: {' '.join(str(error).split())[:400]}")
    return model


def load_tokenizer(source: Path) -> Any:
    """Load the tokenizer of `tokenizer.json`; exits if transformers has none of that kind for the model."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(source.absolute()), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # as above
        sys.exit(f"transformers cannot load its tokenizer: {' '.join(str(error).split())[:400]}")
    if not tokenizer.is_fast:
        sys.exit("its tokenizer is not the one of tokenizer.json")
    return tokenizer


def read_texts(arrays: dict[str, Array]) -> Array:
    """Return texts [rows], or pairs [rows, 2]; exits if the example has something else."""
    columns = [array.reshape(len(array), -1) for array in arrays.values()]
    texts = np.concatenate(columns, axis=1) if columns else np.empty((0, 0))
    if texts.dtype.kind != "U" or texts.shape[1] not in (1, 2) or len(columns) != len(arrays):
        sys.exit(f"expected a column of texts in the example, or two for pairs; got {', '.join(arrays)}")
    return texts[:, 0] if texts.shape[1] == 1 else texts


def tokenize(tokenizer: Any, row: Any, most: int) -> dict[str, Array]:
    """Return the tensors of one text or pair, [1, tokens]."""
    parts = row if isinstance(row, list) else [row]
    made = tokenizer(
        *parts, truncation=True, max_length=most, return_attention_mask=True, return_tensors="np"
    )
    return {name: made[name].astype(np.int64) for name in made}


def prepare_pictures(source: Path, arrays: dict[str, Array]) -> Array:
    """Return pictures as transformers prepares them, [rows, 3, height, width]."""
    pictures = next(iter(arrays.values()))
    if len(arrays) != 1 or pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        sys.exit("expected an array of pictures in the example: uint8 [rows, height, width, 3]")
    processor = transformers.AutoImageProcessor.from_pretrained(
        str(source.absolute()), local_files_only=True, trust_remote_code=False, backend="pil"
    )
    prepared: Array = processor(list(pictures), return_tensors="np")["pixel_values"]
    return prepared.astype(np.float32)


def answer(module: Exported, rows: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Return the answers to rows, each computed alone; shorter rows are followed by zeros."""
    answers: list[list[Array]] = []
    with torch.no_grad():
        for row in rows:
            tensors = [torch.from_numpy(np.ascontiguousarray(row[name])) for name in module.inputs]
            answers.append([value.numpy()[0] for value in module(*tensors)])
    return {
        name: np.stack(pad([answered[at] for answered in answers])) for at, name in enumerate(module.names())
    }


def pad(values: Sequence[Array]) -> list[Array]:
    """Follow shorter arrays by zeros in their first dimension."""
    longest = max(len(value) for value in values)
    return [np.pad(value, [(0, longest - len(value)), *[(0, 0)] * (value.ndim - 1)]) for value in values]


def token_texts(tokenizer: Any, count: int) -> tuple[str, ...]:
    """Return a name for each token that is unique and fits into a line."""
    names: list[str] = []
    seen: set[str] = set()
    for at in range(count):
        token = tokenizer.convert_ids_to_tokens(at) if at < len(tokenizer) else None
        text = " ".join(str(token).split()) if token is not None else ""
        name = text if text and text not in seen else f"{text}<{at}>"
        seen.add(name)
        names.append(name)
    return tuple(names)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), cached="--cache" in sys.argv[4:])
