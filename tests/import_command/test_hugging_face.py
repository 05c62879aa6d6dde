"""Folders of Hugging Face: what their files say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.errors import ConfigError
from inferpool.import_command.conversion_run import Converted
from inferpool.import_command.frameworks import recognise_source
from inferpool.import_command.imported_model import write_model
from inferpool.release.importers.hugging_face_folder import FolderError, make_tables, read_folder

NAMES = {"id2label": {"1": "good", "0": "bad"}}
PICTURES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}


def make(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    """A folder with a config, a tokenizer and weights; `files` are JSON by name, and None leaves one out."""
    written = {"config": config, "tokenizer": {}, **files}
    for name, content in written.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "task", "classes", "activation"),
    [
        ("BertForSequenceClassification", NAMES, "text classification", ("bad", "good"), "softmax"),
        (
            "XForSequenceClassification",
            {**NAMES, "problem_type": "multi_label_classification"},
            *("text classification", ("bad", "good"), "sigmoid"),
        ),
        ("XForSequenceClassification", {"id2label": {"0": "x"}}, "text classification", (), "none"),
        ("XForTokenClassification", NAMES, "token classification", ("bad", "good"), "none"),
        ("XForQuestionAnswering", NAMES, "question answering", (), "none"),
        ("GPT2LMHeadModel", {}, "next token", (), "none"),
        ("LlamaForCausalLM", {}, "next token", (), "none"),
        ("BertModel", {}, "embeddings", (), "none"),
    ],
)
def test_the_class_of_a_model_says_its_task(
    kind: str, config: dict[str, Any], task: str, classes: tuple[str, ...], activation: str, tmp_path: Path
) -> None:
    found = read_folder(make(tmp_path, {"architectures": [kind], **config}))
    assert (found.task, found.kind, found.classes, found.activation) == (task, kind, classes, activation)


@pytest.mark.parametrize(
    ("config", "files", "tokens"),
    [
        ({}, {}, 512),
        ({"max_position_embeddings": 128}, {"tokenizer_config": {"model_max_length": 10**30}}, 128),
        ({"max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}, {}, 512),
        ({"n_positions": 1024}, {"tokenizer_config": {"model_max_length": 256}}, 256),
        ({"max_position_embeddings": 512}, {"sentence_bert_config": {"max_seq_length": 64}}, 64),
    ],
)
def test_the_smallest_stated_limit_holds(
    config: dict[str, Any], files: dict[str, Any], tokens: int, tmp_path: Path
) -> None:
    assert read_folder(make(tmp_path, {"architectures": ["XModel"], **config}, **files)).max_tokens == tokens


def test_embeddings_are_pooled_as_sentence_transformers_says(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    modules = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    config = {"architectures": ["BertModel"]}
    prompts = {"config_sentence_transformers": {"prompts": {"query": 'the "query": '}}}
    found = read_folder(make(tmp_path, config, modules=modules, **prompts))
    assert (found.pooling, found.normalize) == ("first", False)
    [table] = tomllib.loads(make_tables(found, pairs=False)).values()
    options = {"output": "embedding", "normalize": False, "query_prefix": 'the "query": '}
    assert table == {"max_tokens": 512, "embeddings": options}
    for content in ({"pooling_mode": "mean"}, {"pooling_mode_mean_tokens": True}):
        pooling.write_text(json.dumps(content))
        assert read_folder(tmp_path).pooling == "mean"
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(FolderError, match="its pooling is max; expected"):
        read_folder(tmp_path)
    make(tmp_path, config, modules=[*modules, {"type": "a.Dense", "path": "2_Dense"}])
    with pytest.raises(FolderError, match="the module Dense, which is not converted"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("processor", "table"),
    [
        ({"size": {"height": 32, "width": 48}}, {"size": [32, 48]}),
        ({"size": 224}, {"size": [224, 224]}),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 9, "width": 8}},
            {"resize": 256, "size": [9, 8]},
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, {"resize": 256, "size": [224, 224]}),
        ({"size": 8, "rescale_factor": 0.5}, {"size": [8, 8], "scale": 0.5}),
    ],
)
def test_pictures_are_prepared_as_the_processor_says(
    processor: dict[str, Any], table: dict[str, Any], tmp_path: Path
) -> None:
    config = {"architectures": ["ViTForImageClassification"], **NAMES}
    files = {"preprocessor_config": {**PICTURES, **processor}, "tokenizer": None}
    found = read_folder(make(tmp_path, config, **files))
    image = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]} | table
    assert tomllib.loads(make_tables(found, pairs=False)) == {"image": image}


@pytest.mark.parametrize(
    ("config", "files", "problem"),
    [
        ({"auto_map": {"AutoModel": "code.X"}}, {}, "config.json names code of its own .auto_map., which is"),
        ({}, {"tokenizer_config": {"auto_map": {"x": "y"}}}, "tokenizer_config.json names code of its own"),
        ({}, {"tokenizer": None}, "no tokenizer.json: load its tokenizer by .* tokenizer.save_pretrained"),
        ({"quantization_config": {"bits": 4}}, {}, "quantised"),
        ({"architectures": ["XForMaskedLM"]}, {}, "its class is XForMaskedLM; expected one for text"),
        ({"architectures": "XModel"}, {}, "its class is not named in config.json"),
        ({"is_encoder_decoder": True}, {}, "an encoder and a decoder"),
        ({"architectures": ["XForTokenClassification"], "id2label": {"1": "x"}}, {}, "the keys 0 to 0"),
        ({"architectures": ["XForImageClassification"]}, {}, "no preprocessor_config.json"),
        ({}, {"tokenizer_config": []}, "tokenizer_config.json has no JSON object"),
    ],
)
def test_a_folder_that_is_not_converted_is_refused_before_packages_are_fetched(
    config: dict[str, Any], files: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    make(tmp_path, {"architectures": ["XModel"], **config}, **files)
    with pytest.raises(ConfigError, match=problem):
        recognise_source(str(tmp_path), None, weights=False, trusted=True)


def test_pickled_weights_are_refused_also_if_they_are_trusted(tmp_path: Path) -> None:
    (make(tmp_path, {"architectures": ["XModel"]}) / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        recognise_source(str(tmp_path), None, weights=False, trusted=True)
    (tmp_path / "model.bin").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled .*: expected model\.safetensors"):
        recognise_source(str(tmp_path), None, weights=False, trusted=True)


def test_a_pair_of_texts_with_one_score_and_the_licence_reach_the_model_folder(tmp_path: Path) -> None:
    make(tmp_path, {"architectures": ["XForSequenceClassification"], "id2label": {"0": "x"}})
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# X\n")
    found = read_folder(tmp_path)
    about = {
        "kind": "X", "framework": "Y", "converter": "Z", "scores": None, "activation": "none",
        "tables": make_tables(found, pairs=True), "licence": found.licence, "notes": ["A note."],
        "packages": {"Python": "3.12.1", "torch": "2.13.0"},
    }  # fmt: skip
    rows = {"a": np.zeros((1, 1))}
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tokenizer.json").write_text("{}")
    converted = Converted(tmp_path / "work" / "model.onnx", about, rows, rows, alone=True)
    write_model(tmp_path / "m", converted, None, "x", "t.txt", 1e-4)
    table = tomllib.loads((tmp_path / "m" / "model.toml").read_text())["text"]
    assert table["pairs"] is True
    assert table["scores"] == {"output": "logits", "activation": "sigmoid"}
    card = (tmp_path / "m" / "README.md").read_text()
    assert "- **Environment** of the conversion: its own, with Python 3.12.1, torch 2.13.0.\n" in card
    assert "- **Licence**: apache-2.0\n- A note.\n" in card
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
