"""Models of CatBoost and TensorFlow, imported in environments that uv makes, and folders of Hugging Face."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from inferpool import cli

from tests.conftest import Serve
from tests.record import needs_to_run

CATBOOST = """
import numpy as np, catboost
rows = np.random.default_rng(0).random((40, 3))
rows[::7, 1] = np.nan
names = np.array(["low", "middle", "high"])[(rows[:, 0] * 3).astype(int)]
options = {"iterations": 5, "verbose": 0, "allow_writing_files": False}
catboost.CatBoostClassifier(**options).fit(rows, names).save_model("kind.cbm")
model = catboost.CatBoostRegressor(loss_function="Poisson", **options).fit(rows, rows[:, 0] * 9)
model.save_model("count.cbm")
np.save("rows.npy", rows)
"""
TENSORFLOW = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras, numpy as np
tokens, age = keras.Input((None,), dtype="int32", name="tokens"), keras.Input((2,), name="age")
read = keras.layers.Bidirectional(keras.layers.GRU(3))(keras.layers.Embedding(20, 4)(tokens))
both = keras.layers.Concatenate()([read, age])
model = keras.Model([tokens, age], keras.layers.Dense(3, name="kind")(both))
model.save("kind.keras")
model.export("saved", verbose=False)
source = np.random.default_rng(0)
np.savez("rows.npz", tokens=source.integers(0, 20, (5, 7)), age=source.random((5, 2)))
"""


@pytest.fixture
def uv() -> str:
    needs_to_run("large-frameworks")
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else "uv"


def make(uv: str, packages: list[str], code: str, folder: Path) -> None:
    """Run `code` in `folder` with the packages of a framework."""
    wanted = [part for package in packages for part in ("--with", package)]
    subprocess.run([uv, "run", "--no-project", *wanted, "python", "-c", code], cwd=folder, check=True)


@pytest.mark.timeout(1200)
def test_catboost(uv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(uv, ["catboost>=1.2.8", "numpy>=1.26"], CATBOOST, tmp_path)
    rows = ["--example", str(tmp_path / "rows.npy")]
    assert cli.main(["import", str(tmp_path / "kind.cbm"), *rows, "--to", str(tmp_path / "m" / "kind")]) == 0
    assert (
        cli.main(["import", str(tmp_path / "count.cbm"), *rows, "--to", str(tmp_path / "m" / "count")]) == 0
    )
    assert capsys.readouterr().out.count("40 rows differ from CatBoost") == 2
    assert (tmp_path / "m" / "kind" / "labels.txt").read_text().split() == ["high", "low", "middle"]


@pytest.mark.timeout(1200)
def test_tensorflow(uv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(uv, ["tensorflow-cpu>=2.18", "keras>=3.12"], TENSORFLOW, tmp_path)
    rows = ["--example", str(tmp_path / "rows.npz")]
    chosen = [str(tmp_path / "kind.keras"), "--from", "keras-tensorflow"]
    assert cli.main(["import", *chosen, *rows, "--to", str(tmp_path / "m" / "kind")]) == 0
    assert cli.main(["import", str(tmp_path / "saved"), *rows, "--to", str(tmp_path / "m" / "saved")]) == 0
    said = capsys.readouterr().out
    assert "5 rows differ from Keras" in said
    assert "5 rows differ from TensorFlow" in said
    sample = json.loads((tmp_path / "m" / "kind" / "samples" / "imported.json").read_text())
    assert (sorted(sample["inputs"]), list(sample["outputs"])) == (["age", "tokens"], ["kind"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("task", ["classification", "tokens", "answers", "embeddings", "next", "pictures"])
def test_hugging_face(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_to_run("large-frameworks")
    from tests.import_command.hugging_face_models import write  # imports PyTorch, only where it is needed

    example = write(task, tmp_path / task)
    told = ["import", str(tmp_path / task), "--example", str(example), "--to", str(tmp_path / "m" / task)]
    assert cli.main(told) == 0
    assert "rows differ from" in capsys.readouterr().out
    assert (tmp_path / "m" / task / "samples" / "imported.json").exists()
    if task in ("classification", "pictures"):
        assert (tmp_path / "m" / task / "labels.txt").read_text().split() == ["bad", "fine", "good"]


@pytest.mark.timeout(600)
def test_a_causal_model_of_hugging_face_goes_on_from_its_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], serve: Serve
) -> None:
    """Tokens in three requests, each with the cache of the one before, give the scores of a single one."""
    needs_to_run("large-frameworks")
    import numpy as np
    from inferpool import Client

    from tests.import_command.hugging_face_models import GPT2, WORDS, write

    (tmp_path / "m").mkdir()
    example = write("next", tmp_path / "next")
    told = ["import", str(tmp_path / "next"), "--example", str(example), "--to", str(tmp_path / "m" / "next")]
    assert cli.main([*told, "--cache"]) == 0
    # Two of the four texts have three tokens or more.
    assert "(next token, with cache), 2 rows differ from" in capsys.readouterr().out
    assert not (tmp_path / "m" / "next" / "tokenizer.json").exists()
    layers, heads = int(GPT2["n_layer"]), int(GPT2["n_head"])
    size = int(GPT2["n_embd"]) // heads
    tokens = np.array([[4, 5, 6, 7, 8, 9, 10], [9, 5, 4, 7, 8, 10, 11]])
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    nothing = np.zeros((2, heads, 0, size), np.float32)
    with Client(serve(tmp_path / "m").url) as client:
        past = {f"past_key_values.{name}": nothing for name in names}
        whole = client.predict("next", {"input_ids": tokens, **past})
        for first, last in ((0, 4), (4, 5), (5, 7)):
            answered = client.predict("next", {"input_ids": tokens[:, first:last], **past})
            past = {f"past_key_values.{name}": answered.outputs[f"present.{name}"] for name in names}
    np.testing.assert_allclose(answered.outputs["logits"], whole.outputs["logits"], rtol=1e-4, atol=1e-4)
    assert past["past_key_values.0.key"].shape == (2, heads, 7, size)
    assert len((tmp_path / "m" / "next" / "labels.txt").read_text().splitlines()) == len(WORDS)
