"""The codecs of a version: what its `model.toml` makes of pictures, text and labels, with files beside it."""

from __future__ import annotations

from pathlib import Path

from inferpool.backends.base import LoadedModel
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.labels import LabelsCodec, read_labels
from inferpool.codecs.text import TextCodec
from inferpool.errors import ConfigError, LoadError
from inferpool.pool.padding import Padding
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.batching_check import first_line
from inferpool.repository.load.padding_check import prove_padding
from inferpool.tensors import Signature, Tensors


def make_codecs(
    config: ModelConfig, folder: Path | None, signature: Signature
) -> tuple[ImageCodec | None, TextCodec | None, LabelsCodec | None]:
    """What turns pictures and sentences into tensors, and outputs into labels, where `config` asks for it.

    Raises ConfigError, naming the key, where that does not fit the model or its folder, and LoadError.
    """
    try:
        image = ImageCodec(config.image, signature) if config.image is not None else None
        text, classes = None, None
        if config.text is not None and folder is not None:
            file = _inside(folder, "text.tokenizer", config.text.tokenizer)
            text = TextCodec(config.text, signature, file)
        if config.labels is not None and folder is not None:
            names = read_labels(_inside(folder, "labels.file", config.labels.file))
            classes = LabelsCodec(config.labels, signature, names)
    except ConfigError as error:
        where = folder.name if folder is not None else ""
        raise ConfigError(f"{where}/model.toml: {error.detail}") from error
    return image, text, classes


def make_padding(text: TextCodec, model: LoadedModel, *, batched: bool) -> Padding:
    """How rows of different lengths are treated; raises LoadError where the longest cannot be run at all."""
    try:
        model.run(text.made_up(text.max_tokens, 1))
    except Exception as error:  # whatever the runtime raises is this version's fault
        raise LoadError(
            f"a row of {text.max_tokens} tokens cannot be run ({first_line(error)}); set text.max_tokens in"
            " model.toml to what the model takes, or bring the tokenizer that it was trained with"
        ) from error
    padding = Padding(text.fills, text.ids, text.unit, text.max_tokens, mask=text.mask)
    return prove_padding(model, text.made_up(text.unit), padding) if batched else padding


def run_texts(text: TextCodec | None, padding: Padding | None) -> list[Tensors]:
    """Rows of every length that runs on a GPU have; none where lengths are not rounded."""
    if text is None or padding is None:
        return []
    return [text.made_up(length) for length in padding.run_lengths()]


def _inside(folder: Path, key: str, name: str) -> Path:
    """A file of the model's folder; raises ConfigError for one that is not in it, or is none."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()) or (file.exists() and not file.is_file()):
        raise ConfigError(f"{key}: {name} is no file in the model's folder")
    return file
