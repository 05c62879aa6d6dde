"""Measures rows a second and the share of padding for sentences of 3 to 120 words.

    models/minilm/build.py && python benchmarks/text.py [--model FOLDER] [--seconds S] [--rounds N]

The model is any folder with a `[text]` table, by default MiniLM. Inferpool runs in a process of its own,
and clients in this process send one sentence a request over loopback. Two plain loops run in this process
without HTTP: one sentence at a time, and 32 at a time, padded to the longest of them. Both use ONNX
Runtime's own choice of threads. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import random
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parent.parent))

from inferpool.codecs.text import TextCodec
from inferpool.codecs.text_config import TextConfig
from inferpool.tensors import Signature, TensorSpec

from tests.clients import Client, with_clients
from tests.server import Server

SENTENCES = 512
TOGETHER = 32


def make_sentences() -> list[str]:
    """Cut English prose into sentences of 3 to 120 words; every length is equally likely."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    rng = random.Random(0)
    sentences = []
    for _ in range(SENTENCES):
        length, start = rng.randint(3, 120), rng.randrange(len(words) - 120)
        sentences.append(" ".join(words[start : start + length]))
    return sentences


class Plain:
    """The model without a server: the same tokenizer, ONNX Runtime as it comes."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "1/model.onnx")
        specs = tuple(
            TensorSpec(item.name, "INT64" if "int64" in item.type else "INT32", (-1, -1))
            for item in self.session.get_inputs()
        )
        config = TextConfig(**tomllib.loads((folder / "model.toml").read_text()).get("text", {}))
        self.codec = TextCodec(config, Signature(specs, ()), (folder / config.tokenizer).read_bytes())

    def one(self, sentence: str) -> tuple[dict[str, np.ndarray], int]:
        tensors = self.codec.encode(np.array([sentence], object), apart=False)[0].tensors
        return tensors, tensors[self.codec.ids].shape[1]

    def loop(self, sentences: list[str]) -> tuple[int, int]:
        """Run one sentence at a time; return the numbers of tokens and of padding tokens."""
        tokens = 0
        for sentence in sentences:
            tensors, length = self.one(sentence)
            self.session.run(None, tensors)
            tokens += length
        return tokens, 0

    def batches(self, sentences: list[str]) -> tuple[int, int]:
        """Run `TOGETHER` sentences at a time in their order, padded to the longest of them."""
        tokens = padded = 0
        for start in range(0, len(sentences), TOGETHER):
            rows = [self.one(sentence) for sentence in sentences[start : start + TOGETHER]]
            longest = max(length for _, length in rows)
            batch = {
                name: np.concatenate(
                    [
                        np.pad(row[name], ((0, 0), (0, longest - length)), constant_values=fill)
                        for row, length in rows
                    ]
                )
                for name, fill in self.codec.fills.items()
            }
            self.session.run(None, batch)
            real = sum(length for _, length in rows)
            tokens, padded = tokens + real, padded + longest * len(rows) - real
        return tokens, padded


async def closed_loop(port: int, name: str, bodies: list[bytes], clients: int, seconds: float) -> list[int]:
    """Run clients that send the next request after each answer; return the indexes of the answered bodies."""
    answered: list[int] = []
    ends = time.perf_counter() + seconds

    async def work(client: Client, number: int) -> None:
        index = number * len(bodies) // clients
        while time.perf_counter() < ends:
            reply = await client.post(f"/predict/{name}", bodies[index % len(bodies)])
            assert reply.status == 200, reply
            answered.append(index % len(bodies))
            index += 1

    await with_clients(port, clients, work)
    return answered


def rate_of(
    run: Callable[[list[str]], tuple[int, int]], sentences: list[str], seconds: float
) -> tuple[float, float]:
    """Return rows a second and the share of padding."""
    rows = tokens = padded = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        some = sentences[rows % len(sentences) :][: 2 * TOGETHER]
        real, fill = run(some)
        rows, tokens, padded = rows + len(some), tokens + real, padded + fill
    return rows / (time.perf_counter() - began), padded / (tokens + padded)


def row(what: str, rates: list[float], share: float) -> None:
    print(f"| {what} | {statistics.median(rates):.0f} | {100 * share:.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parent.parent / "models" / "minilm"
    parser.add_argument("--model", type=Path, default=folder, help="the model's folder")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each load")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--served-only", action="store_true", help="leave out the loops without a server")
    arguments = parser.parse_args()
    if not (arguments.model / "1/model.onnx").exists():
        sys.exit(f"{arguments.model} is not built yet: {arguments.model / 'build.py'} builds it")
    sentences = make_sentences()
    plain = Plain(arguments.model)
    lengths = [plain.one(sentence)[1] for sentence in sentences]
    print("| sentences of 3 to 120 words | rows a second | padding |\n|---|---|---|")
    if not arguments.served_only:
        for what, run in (
            ("a plain loop, one at a time", plain.loop),
            (f"a plain loop, {TOGETHER} at a time", plain.batches),
        ):
            found = [rate_of(run, sentences, arguments.seconds) for _ in range(arguments.rounds)]
            row(what, [rate for rate, _ in found], found[0][1])
    bodies = [json.dumps({"inputs": [sentence]}).encode() for sentence in sentences]
    name = arguments.model.name
    with tempfile.TemporaryDirectory() as temporary:
        repository = Path(temporary)
        os.environ["INFERPOOL_CACHE_DIR"] = str(repository / ".cache")
        shutil.copytree(arguments.model, repository / name)
        server = Server(repository)
        server.wait_loaded()
        batching = server.get(f"/models/{name}").json()["versions"][0]["batching"]
        for clients in (1, 32):
            rates, tokens = [], 0
            before = server.metric("padded_tokens_total")
            for _ in range(arguments.rounds):
                began = time.perf_counter()
                answered = asyncio.run(closed_loop(server.port, name, bodies, clients, arguments.seconds))
                rates.append(len(answered) / (time.perf_counter() - began))
                tokens += sum(lengths[index] for index in answered)
            padded = server.metric("padded_tokens_total") - before
            row(f"Inferpool, {clients} client{'s' * (clients > 1)}", rates, padded / (tokens + padded))
        print(f"\nbatches of up to {batching['max_rows']} rows of 32 tokens: {batching['reason']}")
        rows, batches = server.metric("batch_rows_sum"), server.metric("batch_rows_count")
        print(f"{rows / batches:.1f} rows a batch")
        server.kill()


if __name__ == "__main__":
    main()
