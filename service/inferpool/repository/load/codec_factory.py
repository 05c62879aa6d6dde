"""Makes the codecs of a version from its `model.toml` and the files beside it: pictures, text and labels."""

from __future__ import annotations

import logging
from pathlib import Path

from inferpool.backends.base import LoadedModel
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.labels import LABELS_FILE, LabelsCodec, read_labels
from inferpool.codecs.text import TextCodec
from inferpool.errors import ConfigError, LoadError, short_reason
from inferpool.pool.padding import Padding
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.padding_check import check_padding
from inferpool.tensors import Signature, Tensors

log = logging.getLogger(__name__)


def make_codecs(
    config: ModelConfig, folder: Path | None, signature: Signature
) -> tuple[ImageCodec | None, TextCodec | None, LabelsCodec | None]:
    """The codecs of pictures, of sentences and of labels; None for each that `config` does not ask for.

    Raises ConfigError, which names the key, if a codec does not fit the model or its folder, and LoadError.
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
        elif folder is not None and (folder / LABELS_FILE).is_file():
            log.warning(
                "%s: %s is not used: add the line [labels] to %s/model.toml",
                folder.name,
                LABELS_FILE,
                folder.name,
            )
    except ConfigError as error:
        name = folder.name if folder is not None else ""
        raise ConfigError(f"{name}/model.toml: {error.detail}") from error
    return image, text, classes


def make_padding(text: TextCodec, model: LoadedModel, *, batched: bool) -> Padding:
    """How rows of different lengths are padded; raises LoadError if the model cannot run the longest."""
    try:
        model.run(text.made_up_rows(text.max_tokens, 1))
    except Exception as error:  # whatever the runtime raises, this version cannot be served
        raise LoadError(
            f"a row of {text.max_tokens} tokens cannot be run ({short_reason(error)}); set text.max_tokens in"
            " model.toml to what the model takes, or bring the tokenizer that it was trained with"
        ) from error
    padding = Padding(text.fills, text.ids, text.unit, text.max_tokens, mask=text.mask)
    return check_padding(model, text.made_up_rows(text.unit), padding) if batched else padding


def make_texts(text: TextCodec | None, padding: Padding | None) -> list[Tensors]:
    """Rows of every length that runs on a GPU have; none if lengths are not rounded."""
    if text is None or padding is None:
        return []
    return [text.made_up_rows(length) for length in padding.run_lengths()]


def _inside(folder: Path, key: str, name: str) -> Path:
    """The path of a file in the model's folder; raises ConfigError if it is elsewhere, or no file."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()) or (file.exists() and not file.is_file()):
        raise ConfigError(f"{key}: expected a file in the model's folder, not {name}")
    return file
