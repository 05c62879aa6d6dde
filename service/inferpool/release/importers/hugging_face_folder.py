"""What a folder of Hugging Face is, by its files alone: the task, the limits and the tables of `model.toml`.

Imports nothing but the standard library, so a folder is refused before any package is fetched for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeGuard

TASKS: Final = {
    "ForSequenceClassification": "text classification",
    "ForImageClassification": "image classification",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
    "ForCausalLM": "next token",
    "LMHeadModel": "next token",
}
"""The task for the end of the class's name in `architectures`. A plain `…Model` makes embeddings."""

_POOLING: Final = {"mean": "mean", "cls": "first", "lasttoken": "last"}
"""The poolings of sentence-transformers that are converted."""
_AFTER_PADDING: Final = ("roberta", "camembert", "mpnet", "longformer")
"""Kinds of models whose positions start behind `pad_token_id`."""
_MOST_TOKENS: Final = 512
"""The limit if neither the model nor its tokenizer has one."""
_MOST_CLASSES: Final = 1 << 20
_MOST_BYTES: Final = 64 << 20


class FolderError(ValueError):
    """The folder cannot be imported; the message says why."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What is imported of a folder.

    Attributes:
        task: A value of `TASKS`, or `embeddings`.
        kind: The class of the model, as `BertModel`.
        classes: The names of the classes in their order; empty if the model has none.
        activation: Makes scores of the output of a classifier: `none`, `softmax` or `sigmoid`.
        max_tokens: The longest text in tokens; 0 for pictures.
        pooling: How the vectors of tokens become one: `mean`, `first` or `last`; for embeddings.
        normalize: Whether vectors are scaled to the length 1; for embeddings.
        image: The table `[image]` of `model.toml`; for pictures.
        prefixes: `query_prefix` and `document_prefix`, if any; for embeddings.
        licence: As the folder's card has it, or empty.
        notes: What a user is to know of the conversion, a sentence each.
    """

    task: str
    kind: str
    classes: tuple[str, ...] = ()
    activation: str = "none"
    max_tokens: int = 0
    pooling: str = ""
    normalize: bool = False
    image: Mapping[str, Any] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    notes: tuple[str, ...] = ()


def read_folder(folder: Path) -> Folder:
    """Return what a folder of Hugging Face has.

    Raises:
        FolderError: the folder has code, pickled weights, no tokenizer.json, or a task that is not converted.
    """
    config = _read(folder / "config.json")
    if not config:
        raise FolderError("it has no config.json")
    _refuse_code(folder, config)
    _refuse_weights(folder, config)
    named = config.get("architectures")
    kind = str(named[0]) if isinstance(named, list) and named else ""
    task = next((task for end, task in TASKS.items() if kind.endswith(end)), "")
    if not task and kind.endswith("Model"):
        task = "embeddings"
    if not task:
        known = ", ".join((*dict.fromkeys(TASKS.values()), "embeddings"))
        raise FolderError(f"its class is {kind or 'not named in config.json'}; expected one for {known}")
    if config.get("is_encoder_decoder"):
        raise FolderError(f"{kind} has an encoder and a decoder, which are not converted")
    licence = _read_licence(folder / "README.md")
    if task == "image classification":
        image, notes = _read_image(folder)
        classes, activation = _read_classes(config)
        return Folder(
            task, kind, classes, activation, image=image, licence=licence, notes=notes
        )  # fmt: skip
    if not (folder / "tokenizer.json").is_file():
        raise FolderError(
            "it has no tokenizer.json: load its tokenizer by transformers' AutoTokenizer, and write the file"
            " with tokenizer.save_pretrained(FOLDER)"
        )
    tokens = _read_max_tokens(folder, config)
    if task == "embeddings":
        pooling, normalize, notes = _read_pooling(folder)
        return Folder(
            task, kind, max_tokens=tokens, pooling=pooling, normalize=normalize,
            prefixes=_read_prefixes(folder), licence=licence, notes=notes,
        )  # fmt: skip
    if task == "text classification":
        classes, activation = _read_classes(config)
        return Folder(task, kind, classes, activation, tokens, licence=licence)
    names = _read_names(config) if task == "token classification" else ()
    return Folder(task, kind, names, max_tokens=tokens, licence=licence)


def make_tables(found: Folder, *, pairs: bool) -> str:
    """Return the tables of `model.toml` but `[labels]`; `pairs` if a row of the example has two texts."""
    if found.task == "image classification":
        return _table("image", found.image)
    text = _table("text", {"max_tokens": found.max_tokens, **({"pairs": True} if pairs else {})})
    if found.task == "embeddings":
        options = {"output": "embedding", "normalize": found.normalize, **found.prefixes}
        return f"{text}\n{_table('text.embeddings', options)}"
    if found.task == "text classification" and not found.classes and pairs:
        return f"{text}\n{_table('text.scores', {'output': 'logits', 'activation': 'sigmoid'})}"
    return text


def _table(name: str, values: Mapping[str, Any]) -> str:
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return f"[{name}]\n{''.join(lines)}"


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON object of a file, or nothing if there is no such file; raises FolderError."""
    if not file.is_file():
        return {}
    if file.stat().st_size > _MOST_BYTES:
        raise FolderError(f"{file.name} is larger than {_MOST_BYTES >> 20} MB")
    try:
        read = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{file.name} is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise FolderError(f"{file.name} has no JSON object")
    return read


def _refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (config if name == "config.json" else _read(folder / name)).get("auto_map"):
            raise FolderError(f"{name} names code of its own (auto_map), which is never run")


def _refuse_weights(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise FolderError("its weights are quantised, which is not converted: import the original")
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise FolderError(
            "its weights are pickled (pytorch_model.bin), which can run code: expected model.safetensors;"
            " load it by transformers if you trust its author, and write the file with"
            " model.save_pretrained(FOLDER)"
        )
    raise FolderError("it has no model.safetensors")


def _read_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes; LABEL_0, LABEL_1 and so on are the names of those that have none."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not named:
        count = config.get("num_labels", 2)
        count = count if _is_count(count) and count <= _MOST_CLASSES else 2
        named = {str(at): f"LABEL_{at}" for at in range(count)}
    if sorted(named) != sorted(map(str, range(len(named)))):
        raise FolderError(f"id2label of config.json has not the keys 0 to {len(named) - 1}")
    return tuple(" ".join(str(named[str(at)]).split()) or f"LABEL_{at}" for at in range(len(named)))


def _read_classes(config: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the names of a classifier's classes and its activation; a regression has none."""
    names, kind = _read_names(config), config.get("problem_type")
    if kind == "regression" or len(names) == 1:
        return (), "none"
    return names, "sigmoid" if kind == "multi_label_classification" else "softmax"


def _read_max_tokens(folder: Path, config: Mapping[str, Any]) -> int:
    """Return the smallest limit that the model, its tokenizer and sentence-transformers state."""
    positions = next(
        (config[name] for name in ("max_position_embeddings", "n_positions") if _is_count(config.get(name))),
        None,
    )
    if positions is not None and str(config.get("model_type")).endswith(_AFTER_PADDING):
        padding = config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    stated = [
        positions,
        _read(folder / "tokenizer_config.json").get("model_max_length"),
        _read(folder / "sentence_bert_config.json").get("max_seq_length"),
    ]
    limits = [int(limit) for limit in stated if _is_count(limit) and limit < 1 << 20]
    return min(limits, default=_MOST_TOKENS)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read_pooling(folder: Path) -> tuple[str, bool, tuple[str, ...]]:
    """Return how vectors are pooled, whether they are scaled, and the notes.

    The files are those of sentence-transformers. Without them it is the mean, scaled.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return "mean", True, ("The folder does not say how vectors of tokens become one: it is their mean.",)
    try:
        listed = json.loads(modules.read_text("utf-8"))
        kinds = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in listed]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FolderError("modules.json is no list of modules") from None
    others = [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise FolderError(f"modules.json has the module {others[0]}, which is not converted")
    path = next((path for kind, path in kinds if kind == "Pooling"), "")
    if not path or Path(path).name != path:
        raise FolderError("modules.json has no Pooling in a folder beside it")
    config = _read(folder / path / "config.json")
    chosen = [
        name.removeprefix("pooling_mode_").partition("_")[0]
        for name, on in config.items()
        if name.startswith("pooling_mode_") and on is True and not name.endswith("sqrt_len_tokens")
    ]
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    if config.get("pooling_mode_mean_sqrt_len_tokens"):
        chosen.append("mean_sqrt_len")
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        stated = " and ".join(chosen) or "not stated"
        raise FolderError(f"its pooling is {stated}; expected mean, cls or lasttoken")
    return _POOLING[chosen[0]], any(kind == "Normalize" for kind, _ in kinds), ()


def _read_prefixes(folder: Path) -> dict[str, str]:
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    found = {"query_prefix": prompts.get("query"), "document_prefix": prompts.get("document")}
    return {name: prompt for name, prompt in found.items() if isinstance(prompt, str) and prompt}


def _read_image(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the table `[image]`, and notes on what differs; raises FolderError."""
    config = _read(folder / "preprocessor_config.json")
    if not config:
        raise FolderError("it has no preprocessor_config.json, which says how pictures are prepared")
    given = config.get("size")
    size: Mapping[str, Any] = given if isinstance(given, dict) else {"height": given, "width": given}
    resize: dict[str, Any] = {}
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        if crop is None and _is_count(edge) and isinstance(config.get("crop_pct"), float):
            crop = edge  # ConvNeXT resizes by this share, and cuts out the centre
            edge = int(edge / config["crop_pct"]) if edge < 384 else edge
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        if not isinstance(crop, dict):
            raise FolderError("its pictures keep their proportions without a crop, which has no fixed size")
        resize, size = {"resize": edge}, crop
    sides = [size.get("height"), size.get("width")]
    if not all(map(_is_count, (*sides, *resize.values()))) or config.get("do_resize") is False:
        raise FolderError("preprocessor_config.json has no size that pictures are resized to")
    table: dict[str, Any] = {**resize, "size": sides}
    factor = config.get("rescale_factor", 1 / 255)
    if config.get("do_rescale") is False:
        factor = 1.0
    if factor != 1 / 255:
        table["scale"] = factor
    if config.get("do_normalize", True):
        mean, std = _numbers(config.get("image_mean")), _numbers(config.get("image_std"))
        if not mean or not std:
            raise FolderError("preprocessor_config.json has no image_mean and image_std")
        table |= {"mean": mean, "std": std}
    if config.get("resample", 2) == 2:
        return table, ()
    return table, (
        "The original resizes pictures by another filter than the server, which is bilinear: scores of"
        " pictures that are resized may differ.",
    )


def _numbers(values: object) -> list[float]:
    """Return a number for each channel; nothing if they are no numbers."""
    listed: list[Any] = values if isinstance(values, list) else [values] * 3
    return listed if all(isinstance(each, int | float) for each in listed) else []


def _read_licence(card: Path) -> str:
    """Return the licence that the head of a card states, or an empty string."""
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(1 << 16).splitlines()
    if lines[:1] != ["---"]:
        return ""
    for line in lines[1:]:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("\"'")[:100]
    return ""
