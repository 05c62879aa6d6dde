"""`model.toml`: the owner's settings for one model. Every key is optional; an unknown key is an error."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from inferpool.backends.base import CpuNodes
from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.labels import LabelsConfig
from inferpool.codecs.text_config import TextConfig
from inferpool.drift.config import DriftConfig
from inferpool.errors import ConfigError, InvalidInput, Reason
from inferpool.privacy.config import SamplesConfig
from inferpool.system.files import printable, read_file
from inferpool.system.gpus import check_devices
from inferpool.tensors import DTYPES, Signature, names_text, shape_text

_Table = ConfigDict(extra="forbid", frozen=True)
_Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Rows = Annotated[int, Field(ge=1, le=1_000_000)]
_Threads = Annotated[int, Field(ge=1, le=1024)]
_Bytes = Annotated[int, Field(ge=1, le=2**50)]
_Size = Annotated[int, Field(ge=-1, le=2**40)]
_Name = Annotated[str, Field(min_length=1, max_length=1000)]
_Digest = Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]
_MOST_BYTES: Final = 256 * 1024
_MOST_FAULTS: Final = 5
"""Faults of a file that are reported together."""
_MOST_CHARACTERS: Final = 100
"""Characters of a key, or of the text of one fault, that are reported."""
_LONG_KEY: Final = re.compile(
    r"""(?<![A-Za-z0-9_-])(?>(?>[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){33}"""
)
"""Keys with dots take memory by the square of their parts. No key of a `model.toml` has more than three.

The search begins at the first character of a word only; at each of its characters it would take seconds.
"""
RESERVED_LABELS = frozenset({"load", "unload", "labels", "rollback", "traffic"})
"""Words that other routes have instead of a version."""


def label_fault(label: str) -> Reason | None:
    """Why a word cannot be a label; None if it can."""
    if not label.isprintable() or len(label) > _MOST_CHARACTERS:
        return (
            f"{label[:_MOST_CHARACTERS]!r} cannot be a label: expected at most {_MOST_CHARACTERS}"
            " characters, and none that cannot be seen"
        )
    if not label.strip(".") or label.isdigit() or "/" in label or label in RESERVED_LABELS:
        return (
            f'"{label}" cannot be a label, because it has another meaning in a path; choose a word'
            f" of more than digits or dots, without a slash, other than {', '.join(sorted(RESERVED_LABELS))}"
        )
    return None


def check_label(label: str) -> None:
    """Raise InvalidInput for a word that cannot be a label."""
    fault = label_fault(label)
    if fault is not None:
        raise InvalidInput(fault, field="label")


class VersionsConfig(BaseModel):
    """`[versions]`: which versions are loaded, and their labels."""

    model_config = _Table
    serve: Literal["all", "latest"] | Annotated[tuple[_Version, ...], Field(max_length=10_000)] = Field(
        default="all", description='Versions to load: `"all"`, `"latest"`, or a list of numbers.'
    )
    labels: dict[str, _Version] = Field(
        default_factory=dict, max_length=1000, description="Names for versions: `{stable = 1, canary = 2}`."
    )

    @model_validator(mode="after")
    def _labels_are_names(self) -> VersionsConfig:
        for label in self.labels:
            fault = label_fault(label)
            if fault is not None:
                raise ValueError(fault)
        return self


class BatchingConfig(BaseModel):
    """`[batching]`: `enabled = false` turns batching off; else it is on if it is proven safe."""

    model_config = _Table
    enabled: bool = Field(default=True, description="`false` runs every request alone.")
    max_rows: _Rows | None = Field(
        default=None, description="Rows of a batch at most.", json_schema_extra={"unset": "measured"}
    )
    max_delay_ms: Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)] = Field(
        default=0.0, description="How long the first request of a batch may wait for others."
    )


class InstancesConfig(BaseModel):
    """`[instances]`: how many on each device, with how many threads each; measured if not set."""

    model_config = _Table
    count: _Threads | None = Field(
        default=None,
        description="Threads that run batches at the same time, on each device.",
        json_schema_extra={"unset": "measured"},
    )
    threads: _Threads | None = Field(
        default=None,
        description="Threads that the runtime uses for one batch.",
        json_schema_extra={"unset": "measured"},
    )
    devices: tuple[str, ...] | None = Field(
        default=None,
        max_length=64,
        description='Where this model runs: `["auto"]`, `["cpu"]` or `["cuda:0", "cuda:1"]`.',
        json_schema_extra={"unset": "setting `devices`"},
    )

    @field_validator("devices")
    @classmethod
    def _devices_are_names(cls, devices: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if devices is not None:
            check_devices(devices)
        return devices


class GpuConfig(BaseModel):
    """`[gpu]`: settings for a model on a GPU."""

    model_config = _Table
    cpu_nodes: CpuNodes = Field(
        default="none",
        description='Nodes that may run on the CPU although the model is on a GPU: `"none"`, `"shapes"`'
        ' (arithmetic with shapes) or `"any"`.',
    )
    tf32: bool = Field(
        default=False,
        description="Let FP32 matrix products round as TF32; `/models` shows the difference that this makes.",
    )
    fp16: bool = Field(
        default=False,
        description="Run FP32 operations in FP16. Inputs and outputs keep their datatypes; `/models` shows"
        " the difference that this makes.",
    )
    memory_bytes: _Bytes | None = Field(
        default=None, description="GPU memory that ONNX Runtime may take for each copy of the model."
    )
    graphs: bool = Field(default=True, description="Replay runs from CUDA graphs if the model allows it.")
    tensorrt: bool = Field(
        default=False,
        description="Let TensorRT take over once its engine is built; `/models` shows the progress.",
    )


class QueueConfig(BaseModel):
    """`[queue]`: how much may wait; by default from the measured rate."""

    model_config = _Table
    max_rows: _Rows | None = Field(
        default=None,
        description="Rows that may wait; by default as many as can run within the setting `queue_ms`.",
        json_schema_extra={"unset": "measured"},
    )
    max_bytes: _Bytes | None = Field(
        default=None,
        description="Bytes of input that may wait.",
        json_schema_extra={"unset": "setting `queue_bytes`"},
    )


class CacheConfig(BaseModel):
    """`[cache]`: whether equal requests share answers."""

    model_config = _Table
    enabled: bool = Field(
        default=False,
        description="Answer equal requests of a tenant from memory, and run equal requests that come at once"
        " only once. Only for a model that always gives the same outputs for the same inputs.",
    )


class TensorConfig(BaseModel):
    """`[[inputs]]`, `[[outputs]]`: what the file does not say about a tensor; -1 in `shape` is any size."""

    model_config = _Table
    name: _Name = Field(
        description="The tensor's name. Inputs are listed by the name that the file gives them; outputs are"
        " listed in the model's order and get these names."
    )
    datatype: str | None = Field(
        default=None, description='`"FP32"`, `"INT64"`, …', json_schema_extra={"unset": "from the model"}
    )
    shape: tuple[_Size, ...] | None = Field(
        default=None,
        max_length=64,
        description="Sizes, -1 for any: `[-1, 3, 224, 224]`.",
        json_schema_extra={"unset": "from the model"},
    )

    @field_validator("datatype")
    @classmethod
    def _datatype_is_known(cls, datatype: str | None) -> str | None:
        if datatype is not None and datatype not in DTYPES:
            raise ValueError(f'"{datatype}" is no datatype; choose from {", ".join(DTYPES)}')
        return datatype


class ModelConfig(BaseModel):
    """The keys of a `model.toml`."""

    model_config = _Table
    description: str = Field(default="", max_length=10_000, description="A sentence that `/models` shows.")
    backend: str | None = Field(
        default=None,
        description='The runtime: `"onnx"`, `"torch"`, or one that an installed package adds.',
        json_schema_extra={"unset": "by the file"},
    )
    sha256: tuple[_Digest, ...] | None = Field(
        default=None,
        max_length=10_000,
        description="Digests of `.pt` and `.pt2` files of this model that are trusted to run code.",
    )
    timeout_ms: Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)] | None = Field(
        default=None, description="Timeout of a request that gives none."
    )
    versions: VersionsConfig = VersionsConfig()
    batching: BatchingConfig = BatchingConfig()
    instances: InstancesConfig = InstancesConfig()
    gpu: GpuConfig = GpuConfig()
    queue: QueueConfig = QueueConfig()
    cache: CacheConfig = CacheConfig()
    samples: SamplesConfig = SamplesConfig()
    drift: DriftConfig = DriftConfig()
    image: ImageConfig | None = None
    text: TextConfig | None = None
    labels: LabelsConfig | None = None
    inputs: Annotated[tuple[TensorConfig, ...], Field(max_length=4096)] = ()
    outputs: Annotated[tuple[TensorConfig, ...], Field(max_length=4096)] = ()

    @field_validator("inputs", "outputs")
    @classmethod
    def _names_differ(cls, tensors: tuple[TensorConfig, ...]) -> tuple[TensorConfig, ...]:
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("two tensors have the same name; give each its own")
        return tensors


def read_config(file: Path) -> ModelConfig:
    """Read a `model.toml`; an absent file counts as an empty one.

    Raises ConfigError, which names the file and the key.
    """
    name = f"{file.parent.name}/{file.name}"
    try:
        text = read_file(file, _MOST_BYTES).decode("utf-8")
        if _LONG_KEY.search(text):
            raise ConfigError(f"{name}: a key has more than 33 parts; expected at most 3")
        table = tomllib.loads(text)
    except FileNotFoundError:
        return ModelConfig()
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error
    except ValueError as error:  # not TOML, not UTF-8, or a number with more digits than Python reads
        raise ConfigError(f"{name}: not valid TOML: {printable(str(error))}") from error
    except OSError as error:
        raise ConfigError(
            f"{name}: {error.strerror}; expected a text file of at most {_MOST_BYTES} bytes"
        ) from error
    try:
        return ModelConfig.model_validate(table)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        faults = [_sentence(fault, ModelConfig) for fault in found[:_MOST_FAULTS]]
        if len(found) > _MOST_FAULTS:
            faults.append(f"{len(found) - _MOST_FAULTS} more faults")
        raise ConfigError(f"{name}: {'; '.join(faults)}") from None


def check_tensors(config: ModelConfig, folder: Path | None, signature: Signature) -> None:
    """Raise ConfigError if `model.toml` describes a tensor otherwise than the model has it."""
    file = f"{folder.name if folder is not None else ''}/model.toml"
    for table, tensors, specs in (
        ("inputs", config.inputs, signature.inputs_by_name),
        ("outputs", config.outputs, signature.outputs_by_name),
    ):
        for tensor in tensors:
            spec = specs.get(tensor.name)
            if spec is None:
                raise ConfigError(
                    f"{file}: {table}: the model has no {tensor.name}; it has {names_text(specs)}"
                )
            if tensor.datatype not in (None, spec.datatype):
                raise ConfigError(
                    f"{file}: {table}: {tensor.name} is {spec.datatype} in the model, not {tensor.datatype}"
                )
            if tensor.shape is not None and tensor.shape != spec.shape:
                raise ConfigError(
                    f"{file}: {table}: {tensor.name} has shape {shape_text(spec.shape)} in the model,"
                    f" not {shape_text(tensor.shape)}"
                )


def _sentence(fault: Any, root: type[BaseModel]) -> str:
    """One validation error as a sentence: `batching.max_row: unknown key, did you mean "max_rows"?`"""
    key = printable(".".join(str(part) for part in fault["loc"]))[:_MOST_CHARACTERS]
    if fault["type"] != "extra_forbidden":
        return f"{key}: {printable(fault['msg'].removeprefix('Value error, '))}"
    known = _keys_at(root, fault["loc"][:-1])
    near = difflib.get_close_matches(str(fault["loc"][-1])[:_MOST_CHARACTERS], known, 1)
    hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


def _keys_at(table: Any, path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an index into a list, whose items have the keys
            continue
        annotation = table.model_fields[part].annotation
        table = next((arg for arg in get_args(annotation) if isinstance(arg, type)), annotation)
    return sorted(table.model_fields)
