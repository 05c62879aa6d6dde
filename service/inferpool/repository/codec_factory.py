"""Makes the codecs of a version: pictures, text and labels.

The source of the codecs is read once, when a version is loaded. A web process makes the same codecs from the
same source, even if the files have changed on disk since then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.labels import LABELS_FILE, LabelsCodec, LabelsConfig, parse_labels, read_labels_file
from inferpool.codecs.text import TextCodec
from inferpool.codecs.text_config import TextConfig
from inferpool.codecs.text_tokenizer import read_tokenizer_file
from inferpool.errors import ConfigError
from inferpool.repository.config import ModelConfig
from inferpool.tensors import Signature

if TYPE_CHECKING:
    from inferpool.codecs.image import ImageCodec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CodecSource:
    """Everything that the codecs of a version are made from.

    Attributes:
        image: the table `[image]` of `model.toml`; None if the model takes no pictures.
        text: the table `[text]`; None if the model takes no sentences.
        labels: the table `[labels]`; None if the model has no labels.
        signature: the model's inputs and outputs, as its file has them.
        tokenizer: the content of the tokenizer's file; empty without `text`.
        names: the content of the file of labels; empty without `labels`.
        takes_pixels: whether the model normalises pictures itself.
    """

    image: ImageConfig | None
    text: TextConfig | None
    labels: LabelsConfig | None
    signature: Signature
    tokenizer: bytes = b""
    names: bytes = b""
    takes_pixels: bool = False


class Codecs(NamedTuple):
    """The codecs of pictures, of sentences and of labels; None for each that the model has not."""

    image: ImageCodec | None = None
    text: TextCodec | None = None
    classes: LabelsCodec | None = None


def read_codec_source(config: ModelConfig, folder: Path | None, signature: Signature) -> CodecSource:
    """Read the files beside a model that its codecs need.

    Raises ConfigError, which names the key, if a file is missing or lies outside `folder`.
    """
    if folder is None:
        return CodecSource(config.image, None, None, signature)
    tokenizer, names = b"", b""
    try:
        if config.text is not None:
            file = _inside(folder, "text.tokenizer", config.text.tokenizer)
            tokenizer = read_tokenizer_file(config.text, file)
        if config.labels is not None:
            names = read_labels_file(_inside(folder, "labels.file", config.labels.file))
        elif (folder / LABELS_FILE).is_file():
            log.warning(
                "%s: %s is not used: add the line [labels] to %s/model.toml",
                folder.name,
                LABELS_FILE,
                folder.name,
            )
    except ConfigError as error:
        raise ConfigError(f"{folder.name}/model.toml: {error.detail}") from error
    return CodecSource(config.image, config.text, config.labels, signature, tokenizer, names)


def make_codecs(source: CodecSource, name: str) -> Codecs:
    """The codecs that `source` asks for; `name` is the model's.

    Raises ConfigError, which names the key, if a codec does not fit the model or its files, and LoadError if
    a package that a codec needs is not installed.
    """
    image, text, classes = None, None, None
    try:
        if source.image is not None:
            # Pillow is imported for models that take pictures, and for no others.
            from inferpool.codecs.image import ImageCodec

            image = ImageCodec(source.image, source.signature)
            if source.takes_pixels:
                image = image.without_normalisation()
        if source.text is not None:
            text = TextCodec(source.text, source.signature, source.tokenizer)
        if source.labels is not None:
            classes = LabelsCodec(
                source.labels, source.signature, parse_labels(source.names, Path(source.labels.file).name)
            )
    except ConfigError as error:
        raise ConfigError(f"{name}/model.toml: {error.detail}") from error
    return Codecs(image, text, classes)


def _inside(folder: Path, key: str, name: str) -> Path:
    """The path of a file in the model's folder; raises ConfigError if it is elsewhere, or no file."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()) or (file.exists() and not file.is_file()):
        raise ConfigError(f"{key}: expected a file in the model's folder, not {name}")
    return file
