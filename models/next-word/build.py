# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "tokenizers>=0.21",
#   "torch==2.13.0",  # the one that the tests run with
#   "tqdm>=4.67",
# ]
# ///
"""Train, evaluate and export the next-word model: from Python's own help texts to a served folder.

    inferpool build next-word [--epochs N] [--seed N] [--out DIR]

A small causal Transformer learns nine tenths of the English prose in `pydoc_data.topics`, the texts of
Python's `help()`. It is written as an ONNX file and as a TorchScript file. The ONNX file, run by ONNX
Runtime, is judged on the tenth it has never seen, beside counts of words, pairs and triples. Nothing is
written where its perplexity is more than `STATED_SHARE` of that of the pairs, or fewer than `STATED_TOP_5` of
the words are among its first five.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(description="Train, evaluate and export the next-word model.")
    parser.add_argument(
        "--epochs", type=int, default=40, metavar="N", help="times over the text (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (default: 0)")
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
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from transformer import MASK, PAD, Array, Graph, Weights, embedded, encoder_layer, padded, run
from word_counts import Counts
from word_network import HEADS, LAYERS, MAX_TOKENS, Network, to_torchscript

STATED_SHARE: Final = 0.9
"""At most this part of the perplexity that counts of pairs have."""
STATED_TOP_5: Final = 0.35
HELD_OUT: Final = 10
"""One paragraph in so many is held out."""
SPLIT_SEED: Final = 0
LEAST_COUNT: Final = 3
"""Words seen less often are not in the vocabulary."""
SPECIAL: Final = ("[PAD]", "[UNK]", "[START]")
MARKS: Final = tuple(".,;:?!()")
UNKNOWN: Final = 1
START: Final = 2
FIRST_WORD: Final = len(SPECIAL) + len(MARKS)
"""The ids of words begin here: what is before is read, and never answered."""
NOISE: Final = 0.25
"""This part of the tokens that are read in training are others, drawn by how common they are."""
BATCH_ROWS: Final = 32
SAMPLES: Final = ("If the object is not", "This method is called when an instance", "The following")


def paragraphs() -> list[str]:
    """Return the different paragraphs of `help()` that are prose, each on one line."""
    texts = [text for name in sorted(topics) for text in re.split(r"\n\s*\n", topics[name])]
    prose = (
        " ".join(text.split())
        for text in texts
        if not re.search(r">>>|::=|([*=~^-])\1{3}", text)  # neither programs, nor grammar, nor headings
        and len(re.findall(r"[A-Za-z]+", text)) > 5
        and sum(sign.isalpha() or sign.isspace() for sign in text) > 0.85 * len(text)
    )
    # The same one, broken into other lines, would be both learned and held out.
    return list(dict.fromkeys(prose))


def split() -> tuple[list[str], list[str]]:
    """Return the paragraphs to learn and those held out: the same ones whatever the seed of the training."""
    shuffled = paragraphs()
    random.Random(SPLIT_SEED).shuffle(shuffled)
    held_out = len(shuffled) // HELD_OUT
    return shuffled[held_out:], shuffled[:held_out]


def make_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Make a tokenizer of the words that `texts` have often enough, and marks; it keeps a text's end."""
    normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("’", "'")])
    # What is neither a word nor a mark, such as numbers, is left out.
    splitter = pre_tokenizers.Split(
        Regex(r"[a-z]+(?:['-][a-z]+)*|[.,;:?!()]"), behavior="removed", invert=True
    )
    words = Counter(
        word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    common = [word for word, count in words.most_common() if count >= LEAST_COUNT and word not in MARKS]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *MARKS, *common])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A", special_tokens=[("[START]", vocabulary["[START]"])]
    )
    tokenizer.enable_truncation(MAX_TOKENS, direction="left")
    return tokenizer


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Turn texts into the ids of their tokens."""
    return [row.ids for row in tokenizer.encode_batch(list(texts))]


def train(rows: Sequence[Sequence[int]], vocabulary: int, epochs: int, seed: int) -> Network:
    """Train the network to say the next word wherever it is one of the vocabulary's."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # a sum split over threads is rounded differently on each machine
    chance = random.Random(seed)
    network = Network(vocabulary, FIRST_WORD)
    common = torch.from_numpy(np.bincount(np.concatenate(rows), minlength=vocabulary) ** 0.75)
    common[[PAD, START]] = 0
    steps = epochs * -(-len(rows) // BATCH_ROWS)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    with tqdm(total=steps, desc="training", unit="batch") as bar:
        for _ in range(epochs):
            order = sorted(range(len(rows)), key=lambda index: len(rows[index]) + 20 * chance.random())
            cut = [order[first : first + BATCH_ROWS] for first in range(0, len(order), BATCH_ROWS)]
            chance.shuffle(cut)
            for picked in cut:
                ids = torch.from_numpy(padded([rows[index] for index in picked])[0])
                read, wanted = ids[:, :-1], ids[:, 1:] - FIRST_WORD
                other = torch.multinomial(common, read.numel(), replacement=True).view(read.shape)
                noisy = torch.where((torch.rand(read.shape) < NOISE) & (read >= len(SPECIAL)), other, read)
                # What is no word of the vocabulary is below nought here: nothing is learned from it.
                loss = nn.functional.cross_entropy(
                    network.everywhere(noisy).flatten(0, 1), wanted.clamp(min=-1).flatten(), ignore_index=-1
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def to_onnx(weights: Weights) -> onnx.ModelProto:
    """Write the network down as an ONNX graph: `logits` [rows, words] of what follows each row."""
    graph = Graph("next-word")
    rows = graph.layer_norm(
        embedded(graph, weights["words.weight"], weights["positions.weight"]), weights, "norm"
    )
    for layer in range(LAYERS):
        rows = encoder_layer(graph, rows, weights, f"layers.{layer}", heads=HEADS, causal=True)
    # Padding follows the last token, and a causal layer looks at nothing that follows.
    length = graph.op("ReduceSum", MASK, graph.integers(1), keepdims=1)
    last = graph.op("GatherND", rows, graph.op("Sub", length, graph.integers(1)), batch_dims=1)
    # The table of vectors is kept once, as it is read.
    table = graph.op(
        "Slice", "words", graph.integers(FIRST_WORD), graph.integers(len(weights["words.weight"]))
    )
    scores = graph.op("MatMul", last, graph.op("Transpose", table, perm=[1, 0]))
    graph.op("Add", scores, graph.constant("bias", weights["bias"]), named="logits")
    return graph.model({"logits": len(weights["bias"])})


def judge(name: str, probabilities: Array, words: Array, unknown: int) -> tuple[float, float]:
    """Print and return the perplexity of known words, and the part of all that were among the first five.

    `probabilities` are [n, words] and `words` [n] those that really came; `unknown` more are in no
    vocabulary.
    """
    given = np.take_along_axis(probabilities, words[:, np.newaxis], axis=1)
    perplexity = float(np.exp(-np.log(given).mean()))
    top_5 = float(((probabilities > given).sum(axis=1) < 5).sum() / (len(words) + unknown))
    print(f"{name:<14}perplexity {perplexity:6.1f}, among the first five {top_5:.1%}")
    return perplexity, top_5


def write(out: Path, model: onnx.ModelProto, network: Network, tokenizer: Tokenizer) -> None:
    """Write version 1 in ONNX, version 2 in TorchScript, the labels, the tokenizer and a golden sample."""
    for folder in ("1", "2", "samples"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "1" / "model.onnx").write_bytes(model.SerializeToString())
    to_torchscript(network, out / "2" / "model.pt")
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[FIRST_WORD:]
    (out / "labels.txt").write_text("".join(f"{word}\n" for word, _ in words))
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    golden = {
        "inputs": {"text": list(SAMPLES)},
        "outputs": {"logits": np.round(run(model, tokens(tokenizer, SAMPLES)).astype(float), 4).tolist()},
        "tolerance": 1e-3,
    }
    (out / "samples" / "beginnings.json").write_text(json.dumps(golden) + "\n")


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()

    texts, unseen = split()
    tokenizer = make_tokenizer(texts)
    vocabulary = tokenizer.get_vocab_size()
    rows = tokens(tokenizer, texts)
    network = train(rows, vocabulary, options.epochs, options.seed)
    model = to_onnx({name: tensor.numpy() for name, tensor in network.state_dict().items()})

    beginnings = [(row[:end], row[end]) for row in tokens(tokenizer, unseen) for end in range(1, len(row))]
    known = [(row, word) for row, word in beginnings if word >= FIRST_WORD]
    unknown = sum(word == UNKNOWN for _, word in beginnings)
    words = np.array([word - FIRST_WORD for _, word in known])
    logits = run(model, [row for row, _ in known])
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    counts = Counts(rows, vocabulary, FIRST_WORD)
    print(f"held out: {len(known)} words of the vocabulary's {vocabulary - FIRST_WORD}, and {unknown} others")
    judge("single words", np.tile(counts.single, (len(words), 1)), words, unknown)
    by_pairs, _ = judge("pairs", np.array([counts.after(row[-1]) for row, _ in known]), words, unknown)
    judge("triples", np.array([counts.after(*row[-2:]) for row, _ in known]), words, unknown)
    perplexity, top_5 = judge("this model", raised / raised.sum(axis=1, keepdims=True), words, unknown)
    if perplexity > STATED_SHARE * by_pairs or top_5 < STATED_TOP_5:
        print(
            f"not written: the card states a perplexity of at most {STATED_SHARE:.0%} of what pairs have, "
            f"and {STATED_TOP_5:.0%} among the first five",
            file=sys.stderr,
        )
        return 1
    write(options.out, model, network, tokenizer)
    print(f"written: {options.out / '1' / 'model.onnx'} and {options.out / '2' / 'model.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
