"""What a `model.toml` says of the tensors of a model, held against the model itself."""

from __future__ import annotations

from pathlib import Path

from inferpool.errors import ConfigError
from inferpool.repository.config import ModelConfig
from inferpool.tensors import Signature, names_text, shape_text


def check_described(config: ModelConfig, folder: Path | None, signature: Signature) -> None:
    """Raise ConfigError where `model.toml` describes a tensor otherwise than the model has it."""
    where = f"{folder.name if folder is not None else ''}/model.toml"
    for table, tensors, specs in (
        ("inputs", config.inputs, signature.inputs_by_name),
        ("outputs", config.outputs, signature.outputs_by_name),
    ):
        for tensor in tensors:
            spec = specs.get(tensor.name)
            if spec is None:
                raise ConfigError(
                    f"{where}: {table}: the model has no {tensor.name}; it has {names_text(specs)}"
                )
            if tensor.datatype not in (None, spec.datatype):
                raise ConfigError(
                    f"{where}: {table}: {tensor.name} is {spec.datatype} in the model, not {tensor.datatype}"
                )
            if tensor.shape is not None and tensor.shape != spec.shape:
                raise ConfigError(
                    f"{where}: {table}: {tensor.name} has shape {shape_text(spec.shape)} in the model,"
                    f" not {shape_text(tensor.shape)}"
                )
