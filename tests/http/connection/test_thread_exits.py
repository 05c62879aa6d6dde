"""A library that ends its thread ends one version or one request, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT, Serve
from tests.text_models import write_encoder

LEAVING = """
class Tokenizer:
    truncation = padding = None

    @staticmethod
    def from_str(text):
        if '"leaves"' in text:
            raise SystemExit("at load")
        return Tokenizer()

    def num_special_tokens_to_add(self, pair):
        return 0

    def no_truncation(self):
        pass

    def encode(self, text, pair=None):
        return Encoding()

    def enable_truncation(self, most, strategy, direction):
        pass

    def no_padding(self):
        pass

    def token_to_id(self, token):
        return None

    def get_added_tokens_decoder(self):
        return {}

    def get_vocab_size(self, with_added_tokens):
        return 200

    def get_vocab(self, with_added_tokens):
        return {str(number): number for number in range(200)}

    def encode_batch_fast(self, texts):
        if any(text.startswith("leave") for text in texts):
            raise SystemExit("at work")
        return [Encoding() for _ in texts]


class Encoding:
    ids, type_ids = [5, 6], [0, 0]

    def __len__(self):
        return 2
"""
"""Replaces a library with one that ends the thread that calls it."""


def test_a_library_that_ends_its_thread_ends_one_version_or_one_request(serve: Serve, tmp_path: Path) -> None:
    library, folder = tmp_path / "library", tmp_path / "models"
    library.mkdir()
    (library / "tokenizers.py").write_text(LEAVING)
    leaves = write_encoder(folder, "a")
    (leaves.parent.parent / "tokenizer.json").write_text('"leaves"')
    write_encoder(folder, "b")
    server = serve(folder, PYTHONPATH=f"{library}:{ROOT}")
    assert "SystemExit: at load" in server.get("/health").json()["problems"]["a/1"]
    answer = server.post("/predict/b", json={"inputs": ["leave" * 1000]})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert server.post("/predict/b", json={"inputs": ["stay"]}).status_code == 200
    # The replaced library cannot explain: a defect of a route is logged with the id of the request.
    defect = server.post("/explain/b", json={"inputs": ["stay"]}, headers={"x-request-id": "explained"})
    assert (defect.status_code, defect.json()["code"]) == (500, "internal_error")
    server.wait_for("^request explained failed$")
    assert not [
        line for line in server.log if line.get("logger") == "uvicorn.error" and "ASGI" in line["message"]
    ]
