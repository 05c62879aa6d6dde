"""Tiny models of Hugging Face with random weights, one for each task, and examples for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    *(
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "a",
        "dog",
        "ran",
        "who",
        "where",
        "?",
    )
]
CLASSES = {0: "bad", 1: "fine", 2: "good"}
NAMED = {"id2label": CLASSES, "label2id": {name: index for index, name in CLASSES.items()}}
BERT = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 48, "initializer_range": 1.0,
}  # fmt: skip
GPT2 = {
    "vocab_size": len(WORDS), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2,
    "initializer_range": 1.0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "initializer_range": 0.5, **NAMED,
}  # fmt: skip
TEXTS = "the cat sat on the mat\na dog\nwho ran ? the dog ran on a mat the cat sat\nunknown\n"
QUESTIONS = (
    "question,context\nwho sat ?,the cat sat on the mat\nwhere ?,a dog ran on the mat a cat sat on the dog\n"
)


def write(task: str, folder: Path) -> Path:
    """Write the model of a task into `folder`, with examples beside it; returns the file of examples."""
    torch.manual_seed(0)
    bert: dict[str, tuple[str, dict[str, Any]]] = {
        "classification": ("BertForSequenceClassification", NAMED),
        "tokens": ("BertForTokenClassification", NAMED),
        "answers": ("BertForQuestionAnswering", {}),
        "embeddings": ("BertModel", {}),
    }
    if task in bert:
        name, more = bert[task]
        config: Any = transformers.BertConfig(**BERT, **more)
        getattr(transformers, name)(config).eval().save_pretrained(folder)
    elif task == "next":
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval().save_pretrained(folder)
    else:
        transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).eval().save_pretrained(folder)
        sizes = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ViTImageProcessor", **sizes})
        )
        examples = folder.with_suffix(".npy")
        np.save(examples, np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8))
        return examples
    _write_tokenizer(folder, pairs=task in bert)
    examples = folder.with_suffix(".csv" if task == "answers" else ".txt")
    examples.write_text(QUESTIONS if task == "answers" else TEXTS)
    return examples


def _write_tokenizer(folder: Path, *, pairs: bool) -> None:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    more: dict[str, Any] = {}
    if pairs:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        more["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=40, **more
    ).save_pretrained(folder)
